"""Tokenizers that merge across boundaries or put a space before every text: what is learnt is what a sampler sees."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule
from datamodules.rows.formats import Example
from datamodules.text.encoding import Encoder
from datamodules.text.tokens import first_tokens
from tests.datamodules.alone import alone

SPECIAL = ["<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]
USER, REPLY = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "The answer is 2."}
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def byte_level(first="", last="", bos="<bos>"):
    """Byte-level BPE that merges spaces and line ends with what follows."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = ["user assistant hello there, The answer is 2. User: a\nAssistant: The\n\n Question"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, special_tokens=SPECIAL)
    )
    if first or last:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}".strip(),
            special_tokens=[(token, backend.token_to_id(token)) for token in (first, last) if token],
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token=bos)


def prefix_space(scheme):
    """BPE in the way of SentencePiece: spaces are letters, and every text gets one at its start."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>"])}
    for letter in [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁0123456789=+[]/:.", *map(chr, range(65, 123))]:
        vocabulary.setdefault(letter, len(vocabulary))
    merges = [
        ("▁", "1"),
        ("▁", "2"),
        ("1", "1"),
        ("=", "2"),
        (":", "▁"),
        ("▁", "T"),
        ("]", "T"),
        ("=", "▁"),
        ("▁", "▁"),
    ]
    for pair in merges:
        vocabulary.setdefault("".join(pair), len(vocabulary))
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def batch_of(module, row, tokenizer, **options):
    data = module(train=[row], tokenizer=tokenizer, **options)
    return next(iter(data.train_dataloader()))


def reply_of(batch):
    return [int(i) for i in batch["labels"][0] if i != -100]


@pytest.mark.parametrize("template", ["plain", "markers", "markers without stop", "boundaries"])
@pytest.mark.parametrize("content", ["The answer is 2.", "\n\nThe answer", " 2"])
def test_demonstrations_begin_with_the_samplers_prompt(templates, template, content):
    """Supervised rows, prompts and pairs of one conversation have the same ids, up to the stop token."""
    tokenizer, reply = byte_level(first="<bos>"), {"role": "assistant", "content": content}
    options = {"chat_template": templates.get(template, template)}
    tuned = batch_of(SFTDataModule, {"messages": [USER, reply]}, tokenizer, **options)
    prompt = batch_of(PromptDataModule, {"messages": [USER, reply]}, tokenizer, **options)["prompts"][0].tolist()
    other = {"role": "assistant", "content": "no"}
    pair = batch_of(
        PreferenceDataModule, {"prompt": [USER], "chosen": [reply], "rejected": [other]}, tokenizer, **options
    )
    assert tuned["input_ids"][0].tolist() == prompt + reply_of(tuned)
    assert pair["prompt_input_ids"][0].tolist() == prompt
    assert pair["chosen_input_ids"][0][pair["chosen_attention_mask"][0].bool()].tolist() == reply_of(tuned)
    assert tokenizer.decode(reply_of(tuned)) == content + ("<eos>" if template == "plain" else "<|im_end|>")


def test_nothing_behind_a_marked_stop_token_is_supervised(templates):
    template = templates["markers"].replace("<|im_end|>{% endgeneration %}", "<|im_end|>{{ '\\n' }}{% endgeneration %}")
    assert template != templates["markers"]
    tokenizer = byte_level()
    tuned = batch_of(SFTDataModule, {"messages": [USER, REPLY, USER, REPLY]}, tokenizer, chat_template=template)
    assert tokenizer.decode(reply_of(tuned)) == "The answer is 2.<|im_end|>" * 2


@pytest.mark.parametrize("scheme", ["legacy", "first", "always", "never"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("1+1=", "2"), ("a 1", "1 b"), ("a: ", "2"), ("a:", " 2"), ("1+1=", " 2"), ("", "a"), ("a", ""), ("a]", "The")],
)
def test_a_completion_gains_no_space(scheme, prompt, completion):
    tokenizer = prefix_space(scheme)
    encoder = Encoder(tokenizer)
    head, tail = alone(tokenizer, encoder.pair(prompt, completion))
    assert head.tolist() == encoder.prompts([Example(prompt=prompt)])[0].tolist()
    assert tokenizer.decode([*head[1:], *tail[:-1]]) == prompt + completion
    assert (head[0], tail[-1]) == (1, 2)


@pytest.mark.parametrize("scheme", ["legacy", "first", "always", "never"])
def test_a_reply_gains_no_space(scheme):
    tokenizer = prefix_space(scheme)
    tuned = batch_of(SFTDataModule, {"messages": [USER, REPLY]}, tokenizer, chat_template=MISTRAL)
    prompt = batch_of(PromptDataModule, {"messages": [USER, REPLY]}, tokenizer, chat_template=MISTRAL)["prompts"][0]
    assert tuned["input_ids"][0].tolist() == prompt.tolist() + reply_of(tuned)
    assert tokenizer.decode(tuned["input_ids"][0]).endswith("[INST] hello [/INST]The answer is 2.</s>")


def test_plain_template_begins_as_the_tokenizer_does():
    for tokenizer, count in (
        (byte_level(first="<bos>"), 1),
        (byte_level(first="<bos>", last="<eos>"), 1),
        (byte_level(), 0),
    ):
        tuned = batch_of(SFTDataModule, {"messages": [USER, REPLY]}, tokenizer, chat_template="plain")
        prompt = batch_of(PromptDataModule, {"prompt": [USER]}, tokenizer, chat_template="plain")
        for ids in (tuned["input_ids"][0].tolist(), prompt["prompts"][0].tolist()):
            assert ids.count(1) == ids[:1].count(1) == count
        assert reply_of(tuned).count(0) == 1


def test_an_end_token_that_is_also_the_first_one():
    only_last = byte_level(last="<eos>", bos="<eos>")
    assert first_tokens(only_last).tolist() == []
    assert (
        batch_of(PretrainDataModule, {"text": "hello"}, only_last)["input_ids"][0].tolist()
        == only_last("hello").input_ids
    )
    assert first_tokens(byte_level(first="<eos>", bos="<eos>")).tolist() == [0]


@pytest.mark.parametrize(
    ("module", "row", "options"),
    [
        (PretrainDataModule, {"text": "bad \ud83d end"}, {}),
        (SFTDataModule, {"prompt": "a", "completion": "bad \ud83d end"}, {}),
        (PromptDataModule, {"prompt": "bad \ud83d end"}, {}),
        (SFTDataModule, {"messages": [{**USER, "content": "bad \ud83d end"}, REPLY]}, {"chat_template": "plain"}),
    ],
)
def test_a_lone_surrogate_is_named_with_its_line(tmp_path, module, row, options):
    path = tmp_path / "rows.jsonl"
    good = json.loads(json.dumps(row).replace("\\ud83d", "x"))
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"train: .*rows\.jsonl:2: the text has a lone surrogate, '\\ud83d', at char"):
        module(train=str(path), tokenizer=byte_level(), **options).setup("fit")
