"""Conversations with calls of tools: what the assistant wrote is learnt, what tools answered is read alone."""

import itertools

import pytest

from datamodules import SFTDataModule
from datamodules.text.chat import PLAIN_TEMPLATE
from tests.datamodules.alone import Chat
from tests.datamodules.test_templates import assistant, make, user
from tests.rollouts.environments import chat_templates, turn_styles

SPECIAL = "<|im_start|> <|im_end|> <|eot_id|> <|start_header_id|> <|end_header_id|>"
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
CALLED = '{"name": "add", "arguments": {"a": 1, "b": "x y"}}'


def tool(text):
    return {"role": "tool", "content": text}


def call(**arguments):
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


CONVERSATION = [
    user("q"),
    assistant("", tool_calls=[call(a=1, b="x y")]),
    tool("42"),
    assistant("", tool_calls=[call(a=1, b="x y")]),
    tool("43\n"),
    assistant("it is 43"),
]


def learnt(template, messages, special=SPECIAL, added="", **options):
    """Runs of learnt tokens and of others in turn, as text, each with whether it is learnt."""
    tokenizer = make(template, special, added)
    rows = [{"messages": messages, "tools": TOOLS}]
    data = SFTDataModule(train=rows, tokenizer=tokenizer, batch_size=1, shuffle=False, **options)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    pairs = zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True)
    return [
        (bool(on), tokenizer.decode([token for token, _ in run]))
        for on, run in itertools.groupby(pairs, key=lambda pair: pair[1] >= 0)
    ]


@pytest.mark.parametrize(
    ("template", "written", "end"),
    [
        (PLAIN_TEMPLATE, f"<tool_call>{CALLED}</tool_call>", "<eos>"),
        (chat_templates.HERMES, f"\n<tool_call>\n{CALLED}\n</tool_call>", "<|im_end|>"),
        (chat_templates.LLAMA, CALLED.replace("arguments", "parameters"), "<|eot_id|>"),
        (
            chat_templates.QWEN_XML,
            "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx y\n</parameter>\n"
            "</function>\n</tool_call>",
            "<|im_end|>",
        ),
    ],
    ids=["plain", "hermes", "llama", "qwen xml"],
)
def test_calls_are_learnt_and_results_are_not(template, written, end):
    runs = learnt(template, CONVERSATION)
    assert [text.removeprefix("\n") for on, text in runs if on] == [
        written.removeprefix("\n") + end,
        written.removeprefix("\n") + end,
        "it is 43" + end,
    ]
    others = [text for on, text in runs if not on]
    assert ["42" in others[1], "43" in others[2]] == [True, True]
    assert "q" in others[0]


def test_the_plain_template_shows_tools_calls_and_results():
    messages = [user("q"), assistant("Let me see.", tool_calls=[call(a=1), call(b=2)]), tool("1"), tool("2")]
    text = "".join(text for _, text in learnt("plain", [*messages, assistant("3")], chat_template="plain"))
    assert text == (
        'Tools:\n{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": '
        '{"type": "object"}}}\nCalls: <tool_call>{"name": ..., "arguments": {...}}</tool_call>\n'
        "User: q\nAssistant: Let me see.\n"
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n'
        '<tool_call>{"name": "add", "arguments": {"b": 2}}</tool_call><eos>\n'
        "Tool: 1\nTool: 2\nAssistant: 3<eos>"
    )


def test_the_last_turn_alone():
    assert [text for on, text in learnt("plain", CONVERSATION, chat_template="plain", loss_on="last_turn") if on] == [
        "it is 43<eos>"
    ]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (turn_styles.LLAMA, ["<|eom_id|>", "<|eot_id|>"]),
        (chat_templates.LLAMA, ["<|eot_id|>"]),
        (turn_styles.QWEN, ["<|im_end|>"]),
        (PLAIN_TEMPLATE, []),
        (PLAIN_TEMPLATE.replace("{{ eos_token }}", ""), []),
        (turn_styles.LLAMA.replace("{%- if add_generation_prompt %}", "{% if true %}"), ["<|eom_id|>", "<|eot_id|>"]),
    ],
    ids=["another end", "llama", "qwen", "plain", "no end", "another end, always a header"],
)
@pytest.mark.parametrize("special", [True, False])
def test_what_ends_a_turn_with_calls_is_a_stop_token(template, ends, special):
    tokens = f"{SPECIAL} <|eom_id|> <tool_call> </tool_call>"
    tokenizer = make(template, tokens) if special else make(template, "", tokens)
    assert set(Chat(tokenizer).stop_token_ids()) == {
        tokenizer.eos_token_id,
        *tokenizer.convert_tokens_to_ids(ends),
    }


def test_a_turn_with_calls_is_learnt_up_to_its_own_end():
    runs = learnt(turn_styles.LLAMA, CONVERSATION, special="", added="<|eom_id|> <|eot_id|>")
    assert [text[-10:] for on, text in runs if on] == ["<|eom_id|>", "<|eom_id|>", "<|eot_id|>"]
