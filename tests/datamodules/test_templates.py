"""Templates in the styles of well-known families: what is learnt, what a sampler is given, and what ends a reply."""

import logging
import re

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules import PreferenceDataModule, PromptDataModule, SFTDataModule
from datamodules.text.chat import PLAIN_TEMPLATE
from tests.datamodules.alone import Chat

EACH, END = "{% for m in messages %}", "{% endfor %}"
CHATML = EACH + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n" + END
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HEADER = "<|im_start|>assistant\n"
ALWAYS = "{{ '<|im_start|>assistant\\n' }}"  # a template's own last line end would be cut
SYSTEM_IN_USER = (
    "{% if messages[0]['role'] == 'system' %}{% set ns = namespace(s=messages[0]['content'] + '\n') %}"
    "{% set messages = messages[1:] %}{% else %}{% set ns = namespace(s='') %}{% endif %}"
)

# name: (template, tokens marked special, added tokens that are not, end-of-sequence token,
#        a reply @ as a target, as an earlier turn's target, the end of the prompt, stop tokens)
STYLES = {
    "chatml": (CHATML + CHATML_PROMPT, "<|im_start|> <|im_end|>", "", "<eos>", "@<|im_end|>", None, HEADER),
    "chatml, end not special": (
        CHATML + CHATML_PROMPT, "", "<|im_start|> <|im_end|>", "<eos>", "@<|im_end|>", None, HEADER,
    ),
    "default system": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        + CHATML + CHATML_PROMPT,
        "<|im_start|> <|im_end|>", "", "<|im_end|>", "@<|im_end|>", None, HEADER,
    ),
    "always the next header": (CHATML + ALWAYS, "<|im_start|> <|im_end|>", "", "<eos>", "@<|im_end|>", None, HEADER),
    "markers": (
        EACH + "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}"
        + END + CHATML_PROMPT,
        "", "<|im_start|> <|im_end|>", "<eos>", "@<|im_end|>", None, HEADER,
    ),
    "markers without stop": (
        EACH + "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>{{ '\\n' }}" + END + ALWAYS,
        "", "<|im_start|> <|im_end|>", "<eos>", "@<|im_end|>", None, HEADER,
    ),
    "llama 3": (
        "{{ bos_token }}" + EACH + "<|start|>{{ m['role'] }}<|head|>\n\n{{ m['content'] | trim }}<|eot|>" + END
        + "{% if add_generation_prompt %}<|start|>assistant<|head|>\n\n{% endif %}",
        "<bos> <|start|> <|head|> <|eot|>", "", "<eos>", "@<|eot|>", None, "<|start|>assistant<|head|>\n\n",
    ),
    "llama 2": (
        SYSTEM_IN_USER + EACH + "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ ns.s }}{{ m['content'] }} [/INST]"
        "{% set ns.s = '' %}{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}" + END,
        "<bos>", "", "<eos>", " @ <eos>", None, " [/INST]",
    ),
    "mistral": (
        SYSTEM_IN_USER + "{{ bos_token }}" + EACH
        + "{% if m['role'] == 'user' %}[INST]{{ ns.s }}{{ m['content'] }}[/INST]"
        "{% set ns.s = '' %}{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}" + END,
        "<bos> [INST] [/INST]", "", "<eos>", "@<eos>", None, "[/INST]",
    ),
    "gemma": (
        SYSTEM_IN_USER + "{{ bos_token }}" + EACH + "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ ns.s }}{% set ns.s = '' %}{{ m['content'] | trim }}<turn|>\n" + END
        + "{% if add_generation_prompt %}<turn>model\n{% endif %}",
        "<bos> <turn> <turn|>", "", "<eos>", "@<turn|>", None, "<turn>model\n",
    ),
    "phi 3": (
        EACH + "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n" + END
        + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|user|> <|assistant|> <|system|> <|end|>", "", "<eos>", "@<|end|>", None, "<|assistant|>\n",
    ),
    "zephyr": (
        EACH + "<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n" + END
        + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "", "", "</s>", "@</s>", None, "<|assistant|>\n",
    ),
    "deepseek r1": (
        "{{ bos_token }}" + EACH + "{% if m['role'] == 'assistant' %}<|Assistant|>"
        "{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% else %}"
        "{% if m['role'] == 'user' %}<|User|>{% endif %}{{ m['content'] }}{% endif %}" + END
        + "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "<bos> <|User|> <|Assistant|>", "<think> </think>", "<eos>", "@<eos>", None, "<|Assistant|><think>\n",
    ),
    "opens a thought": (
        CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "<|im_start|> <|im_end|>", "<think> </think>", "<eos>", "@<|im_end|>", None, HEADER + "<think>\n",
    ),
    "another end for the last": (
        EACH + "<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>"
        "{{ m['content'] }}{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}" + END
        + "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|start|> <|channel|> <|message|> <|end|> <|return|>", "", "<|return|>",
        "<|channel|>final<|message|>@<|return|>", "<|channel|>final<|message|>@<|end|>", "<|start|>assistant",
    ),
    "end token at the very end": (
        EACH + "{{ m['role'] }}: {{ m['content'] }}\n" + END
        + "{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}",
        "", "", "<eos>", "@\n<eos>", "@\n", "assistant: ",
    ),
    "no stop": (
        EACH + "### {{ m['role'] }}:\n{{ m['content'] }}\n\n" + END
        + "{% if add_generation_prompt %}### assistant:\n{% endif %}",
        "", "", "<eos>", "@\n\n<eos>", "@\n\n", "### assistant:\n",
    ),
    "always the next header, no stop": (
        EACH + "<|{{ m['role'] }}|>{{ m['content'] }}" + END + "<|assistant|>",
        "<|user|> <|assistant|> <|system|>", "", "<eos>", "@<eos>", "@", "<|assistant|>",
    ),
    "ignores the prompt's switch": (
        EACH + "{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n" + END,
        "", "", "<eos>", "@<eos>", None, "assistant: ",
    ),
    "plain": (PLAIN_TEMPLATE, "", "", "<eos>", "@<eos>", None, "Assistant: "),
}  # fmt: skip


def make(template, special="", plain="", eos="<eos>"):
    """One token a byte; the end-of-sequence token, the special tokens and the added ones each one token."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    base = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    base.pre_tokenizer, base.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    base.add_special_tokens(list(dict.fromkeys([eos, "<pad>", *special.split()])))
    base.add_tokens([AddedToken(text, special=False) for text in plain.split()])
    bos = {"bos_token": "<bos>"} if "<bos>" in special else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token=eos, pad_token="<pad>", **bos)
    tokenizer.chat_template = template
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}


def targets(tokenizer, messages, **options):
    """The text of a demonstration, and each run of its targets."""
    data = SFTDataModule(train=[{"messages": messages}], tokenizer=tokenizer, **options)
    batch = next(iter(data.train_dataloader()))
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    runs, before = [], -100
    for label in labels:
        if label != -100:
            runs = [*runs, [label]] if before == -100 else [*runs[:-1], [*runs[-1], label]]
        before = label
    return ids, [tokenizer.decode(run) for run in runs]


@pytest.fixture(params=STYLES)
def style(request):
    template, special, plain, eos, reply, earlier, prompt = STYLES[request.param]
    return make(template, special, plain, eos), reply, earlier or reply, prompt


def test_demonstrations(style):
    """One turn, a system message, two turns and the last alone: exactly the replies, each with what ends it."""
    tokenizer, reply, earlier, _ = style
    for start in ([], [SYSTEM]):
        one, two = [*start, user("q"), assistant("a")], [*start, user("q"), assistant("b"), user("r"), assistant("a")]
        ids, found = targets(tokenizer, one)
        assert found == [reply.replace("@", "a")]
        whole = tokenizer(tokenizer.apply_chat_template(one, tokenize=False), add_special_tokens=False)["input_ids"]
        appended = int(whole[: len(ids)] != ids)  # the stop token that the template does not write
        assert ids[: len(ids) - appended] == whole[: len(ids) - appended]
        ids, found = targets(tokenizer, two)
        assert found == [earlier.replace("@", "b"), reply.replace("@", "a")]
        assert targets(tokenizer, two, loss_on="last_turn") == (ids, found[1:])


def test_prompts_and_pairs(style):
    """A sampler's prompt is the generation prompt; prompt and completion of a pair are those of a demonstration."""
    tokenizer, reply, earlier, prompt = style
    opened = prompt.endswith("<think>\n")
    given = next(iter(PromptDataModule(train=[{"prompt": [user("q")]}], tokenizer=tokenizer).train_dataloader()))
    assert tokenizer.decode(given["prompts"][0]).endswith(f"q{prompt}" if prompt[0] in " [" else prompt)
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    batch = next(iter(PreferenceDataModule(train=[row], tokenizer=tokenizer).train_dataloader()))
    assert "chosen_loss_mask" not in batch
    assert tokenizer.decode(batch["chosen_input_ids"][0]) == reply.replace("@", "a")
    assert tokenizer.decode(batch["rejected_input_ids"][0]) == reply.replace("@", "b")
    head = batch["prompt_input_ids"][0].tolist()
    assert head + batch["chosen_input_ids"][0].tolist() == targets(tokenizer, [user("q"), assistant("a")])[0]
    assert tokenizer.decode(head) == tokenizer.decode(given["prompts"][0]).removesuffix("<think>\n" if opened else "")

    turns = {side: [*row[side], user("r"), assistant("c")] for side in ("chosen", "rejected")}
    batch = next(iter(PreferenceDataModule(train=[row | turns], tokenizer=tokenizer).train_dataloader()))
    for side, first in (("chosen", "a"), ("rejected", "b")):
        scored = batch[f"{side}_input_ids"][0][batch[f"{side}_loss_mask"][0].bool()]
        assert tokenizer.decode(scored) == earlier.replace("@", first) + reply.replace("@", "c")


def test_what_ends_a_reply_is_a_stop_token(style):
    tokenizer, reply, earlier, _ = style
    stops = SFTDataModule(train=[], tokenizer=tokenizer).stop_token_ids
    ends = {text[text.rindex("<") :].strip() for text in (reply, earlier) if text.endswith(">")}
    assert set(tokenizer.convert_ids_to_tokens(list(stops))) == ends | {tokenizer.eos_token}


REASONER = "deepseek r1"


@pytest.mark.parametrize("name", ["deepseek r1", "opens a thought"])
@pytest.mark.parametrize("content", ["<think>\nwhy\n</think>\n\na", "<think>why</think>a"])
def test_a_thought_is_learnt_behind_the_prompt_that_opens_it(name, content):
    template, special, plain, eos, reply, *_ = STYLES[name]
    tokenizer = make(template, special, plain, eos)
    ids, found = targets(tokenizer, [user("q"), assistant("b"), user("r"), assistant(content)])
    text = tokenizer.decode(ids)
    answer = content.removeprefix("<think>").removeprefix("\n")
    if name == REASONER:  # conversations lose their thoughts, the last reply gets its own back
        assert text.endswith("<|User|>r<|Assistant|><think>\n" + answer + eos)
    assert found == [reply.replace("@", "b"), reply.replace("@", answer)]
    row = {"prompt": [user("q")], "chosen": [assistant(content)], "rejected": [assistant("b")]}
    batch = next(iter(PreferenceDataModule(train=[row], tokenizer=tokenizer).train_dataloader()))
    scored = batch["chosen_input_ids"][0][batch["chosen_loss_mask"][0].bool()]
    assert tokenizer.decode(scored) == reply.replace("@", answer)  # what the prompt writes is context
    assert tokenizer.decode(batch["rejected_input_ids"][0]) == reply.replace("@", "b")


def test_prompts_that_differ_from_demonstrations_are_said_once(caplog):
    template, special, plain, eos, *_ = STYLES[REASONER]
    chat = Chat(make(template, special, plain, eos))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            chat.encode([user("q"), assistant("a")])
    assert [r.message for r in caplog.records if "generation prompt ends with '<think>" in r.message] == [
        caplog.records[0].message
    ]


def test_a_prompt_that_cannot_be_told_says_why():
    template = (
        EACH + "<|{{ m['role'] }}|>{{ m['content'] }}<eos>" + END + "{% if add_generation_prompt %}<|model|>{% endif %}"
    )
    template = template.replace("<|{{", "<|{{ loop.length }}{{")  # the number of messages stands in front of each
    with pytest.raises(
        ValueError, match=r"message 1 cannot be told.*generation prompt writes.*more than a reply's header"
    ):
        Chat(make(template)).encode([user("q"), assistant("a")])


CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {}}}]


def chat(name="chatml", template=None):
    return Chat(make(template or STYLES[name][0], *STYLES[name][1:4]))


@pytest.mark.parametrize(
    ("messages", "template", "named"),
    [
        ([user("q"), assistant("", tool_calls=CALL)], None, "does not render tool_calls of message 1"),
        ([user("q"), assistant("a", tool_calls=CALL)], None, "does not render tool_calls of message 1"),
        (
            [user("q"), assistant("hm")],
            EACH + "{{ m['role'] }}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}<eos>" + END,
            "does not render the content of message 1",
        ),
        (
            [SYSTEM, user("q"), assistant("a")],
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
            r"refuses a conversation with the roles \['system', 'user', 'assistant'\]: no system",
        ),
    ],
)
def test_what_is_not_shown_is_not_learnt(messages, template, named):
    with pytest.raises(ValueError, match=named):
        chat(template=template).encode(messages)


DROPS_SYSTEM = EACH + "{% if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endif %}" + END


@pytest.mark.parametrize(
    ("messages", "options", "named"),
    [
        (
            [user("q"), assistant("a", reasoning_content="hm")],
            {},
            "'reasoning_content' of messages with role 'assistant'",
        ),
        ([{"name": "Ann", **user("q")}, assistant("a")], {}, "'name' of messages with role 'user'"),
        ([SYSTEM, user("q"), assistant("a")], {"template": DROPS_SYSTEM}, "content of message 0 .role 'system'."),
        (
            [user("q"), assistant("b", tool_calls=CALL), user("r"), assistant("a")],
            {"last": True},
            "tool_calls of message 1",
        ),
        ([user("q"), assistant("a")], {"tools": TOOLS}, "does not render tools"),
        ([user("q"), assistant("<think>hm</think>b"), user("r"), assistant("a")], {"name": REASONER}, "thoughts"),
    ],
)
def test_context_that_is_not_shown_is_said_once(caplog, messages, options, named):
    one = chat(options.get("name", "chatml"), options.get("template"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            one.encode(messages, last_only=options.get("last", False), tools=options.get("tools"))
    assert sum(bool(re.search(named, record.message)) for record in caplog.records) == 1


def test_what_is_shown_is_silent(caplog):
    shows = (
        "{% if tools %}{{ tools | tojson }}\n{% endif %}" + EACH + "<|im_start|>{{ m['role'] }}\n"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] | trim }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
        + END + CHATML_PROMPT
    )  # fmt: skip
    one = chat(template={"default": CHATML + CHATML_PROMPT, "tool_use": shows})
    messages = [user(" q\n"), assistant(" a ", tool_calls=CALL, reasoning_content="hm")]
    with caplog.at_level(logging.WARNING):
        ids, mask = one.encode(messages, tools=TOOLS)
    assert not caplog.records
    reply = one.tokenizer.decode(ids[mask])
    assert reply.startswith("<think>hm</think>a<tool_call>")
    assert reply.endswith("</tool_call><|im_end|>")
    prompt, completion, scored = one.encode_completion(messages[:1], messages[1:], TOOLS)
    np.testing.assert_array_equal(np.concatenate((prompt, completion)), ids)
    assert scored.all()


def test_a_pair_cut_down_to_context_is_dropped():
    template, special, plain, eos, *_ = STYLES[REASONER]
    row = {"prompt": [user("q")], "chosen": [assistant("<think>why</think>a")], "rejected": [assistant("b")]}
    rows = [row, row | {"chosen": [assistant("a")]}]
    data = PreferenceDataModule(train=rows, tokenizer=make(template, special, plain, eos), max_length=4, shuffle=False)
    data.setup("fit")
    assert (data.reports["train"]["kept"], data.reports["train"]["dropped_without_target"]) == (1, 1)
