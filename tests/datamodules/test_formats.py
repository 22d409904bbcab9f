import json
import logging

import numpy as np
import pytest
import torch

from datamodules import (
    PreferenceDataModule,
    PretrainDataModule,
    PromptDataModule,
    SFTDataModule,
    UnpairedDataModule,
)
from datamodules.rows import formats
from datamodules.rows.formats import Example, normalise, recognise
from datamodules.text.encoding import Encoder

USER, REPLY, OTHER = ({"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("assistant", "c")])

ROWS = [
    ({"text": "a"}, formats.TEXT),
    ({"prompt": "a", "completion": "b", "label": "hard"}, formats.PROMPT_COMPLETION),
    ({"prompt": [USER], "completion": [REPLY]}, formats.PROMPT_COMPLETION),
    ({"messages": [USER, REPLY]}, formats.MESSAGES),
    ({"instruction": "a", "input": "", "output": "b"}, formats.ALPACA),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, formats.SHAREGPT),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, formats.PREFERENCE),
    ({"prompt": "a", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, formats.PREFERENCE),
    ({"chosen": "a b", "rejected": "a c", "prompt": None}, formats.IMPLICIT_PREFERENCE),
    ({"chosen": [USER, REPLY], "rejected": [USER, OTHER]}, formats.IMPLICIT_PREFERENCE),
    ({"prompt": "a", "completions": ["c", "b"], "rewards": [0.0, 1]}, formats.SCORED),
    ({"prompt": "a", "completion": "b", "label": True}, formats.UNPAIRED),
    ({"prompt": "a", "answer": 3}, formats.PROMPT),
    ({"foo": 1}, None),
]


@pytest.mark.parametrize(("row", "name"), ROWS)
def test_recognised(row, name):
    assert recognise(row) == name


def test_canonical_form():
    conversational = [{"role": "user", "content": "a"}]
    for row in ({"messages": [USER, REPLY]}, {"conversations": [{"from": "human", "value": "a"}, REPLY]}):
        example = normalise(row, recognise(row))
        assert example.messages == [USER, REPLY]
        assert example.prompt == conversational
        assert example.completion == [REPLY]
    assert normalise({"prompt": "a", "chosen": [REPLY], "rejected": [OTHER]}, formats.PREFERENCE).prompt == [USER]
    explicit = normalise(ROWS[7][0], formats.PREFERENCE)
    assert (explicit.prompt, explicit.chosen, explicit.rejected) == ([USER], [REPLY], [OTHER])
    scored = normalise(ROWS[10][0], formats.SCORED)
    assert (scored.prompt, scored.chosen, scored.rejected) == ("a", "b", "c")
    assert normalise({"prompt": "a", "completions": ["b", "c"], "rewards": [1, 1]}, formats.SCORED) is None
    assert normalise(ROWS[11][0], formats.UNPAIRED).label is True
    chat = normalise({"prompt": "a", "completion": "b"}, formats.PROMPT_COMPLETION, as_chat=True)
    assert (chat.prompt, chat.completion) == ([USER], [REPLY])


def test_alpaca():
    row = {"instruction": "add", "input": "1 2", "output": "3", "system": "be short", "history": [["q", "r"]]}
    example = normalise(row, formats.ALPACA, as_chat=True)
    assert [m["content"] for m in example.prompt] == ["be short", "q", "r", "add\n\n1 2"]
    assert example.completion == [{"role": "assistant", "content": "3"}]
    plain = normalise({"instruction": "add", "input": "1 2", "output": "3"}, formats.ALPACA)
    assert plain.prompt == "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("2+2 is four", "2+2 is five", "2+2 is"),
        ("2+2 is four", "2+2 is fo", "2+2 is"),
        ("\n\nHuman: q\n\nAssistant: I do", "\n\nHuman: q\n\nAssistant: I can", "\n\nHuman: q\n\nAssistant:"),
    ],
)
def test_implicit_prompt(chosen, rejected, prompt):
    example = normalise({"chosen": chosen, "rejected": rejected}, formats.IMPLICIT_PREFERENCE)
    assert example.prompt == prompt
    assert (prompt + example.chosen, prompt + example.rejected) == (chosen, rejected)


@pytest.mark.parametrize(
    ("row", "name", "message"),
    [
        ({"prompt": "a"}, formats.PROMPT_COMPLETION, r"needs column completion .*found \['prompt'\]"),
        (
            {"prompt": 3, "completion": "b"},
            formats.PROMPT_COMPLETION,
            r"prompt must be a string .*found int: 3",
        ),
        ({"text": ["a"]}, formats.TEXT, "column text must be a string, found list"),
        ({"messages": []}, formats.MESSAGES, "messages is an empty list"),
        ({"messages": [{"content": "a"}]}, formats.MESSAGES, r"message 0 needs a role, found the keys \['content'\]"),
        ({"messages": [{"role": "user"}]}, formats.MESSAGES, "message 0 needs a content"),
        ({"messages": ["a"]}, formats.MESSAGES, "message 0 must be a mapping, found 'a'"),
        ({"conversations": [{"from": "cat", "value": ""}]}, formats.SHAREGPT, "is from 'cat'; known: "),
        ({"prompt": "a", "completion": "b", "label": 3}, formats.UNPAIRED, "label must be true or false, found 3"),
        ({"chosen": "a", "rejected": [REPLY]}, formats.IMPLICIT_PREFERENCE, "both be strings or both"),
        ({"chosen": [REPLY], "rejected": [OTHER]}, formats.IMPLICIT_PREFERENCE, "share no first message"),
        ({"prompt": "a", "completions": ["b"], "rewards": [1, 2]}, formats.SCORED, "same length of at least 2"),
        (
            {"prompt": "a", "completions": ["b", "c"], "rewards": [1, None]},
            formats.SCORED,
            "must hold numbers",
        ),
        ({"instruction": "a", "output": "b", "history": [["a", "b"]]}, formats.ALPACA, "needs a tokenizer with a chat"),
        ({"chosen": "yes", "rejected": "no"}, formats.IMPLICIT_PREFERENCE, "the prompt would be empty"),
        ({"prompt": "a", "query": "b", "answer": 1}, formats.PROMPT, "columns prompt and query both hold a question"),
        (
            {"prompt": "a", "completion": "b", "images": ["x.png"]},
            formats.PROMPT_COMPLETION,
            "column images holds .* only text is",
        ),
        ({"prompt": "a", "tools": [{"name": "f"}]}, formats.PROMPT, "column tools needs messages"),
        ({"prompt": "a", "system": 3}, formats.PROMPT, "column system must be a string, found int: 3"),
        (
            {"prompt": "a", "chosen": [USER, {**REPLY, "train": False}], "rejected": [USER, OTHER]},
            formats.PREFERENCE,
            "marked",
        ),
        ({"messages": [{"role": "cat", "content": "a"}]}, formats.MESSAGES, "message 0 is from 'cat'; known"),
        ({"messages": [USER, {**REPLY, "weight": -1}]}, formats.MESSAGES, "weight=-1; it must be a finite number of"),
        ({"messages": [{**USER, "train": True}, REPLY]}, formats.MESSAGES, "only an assistant's messages are learnt"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, formats.MESSAGES, "of the type 'image'"),
        ({"messages": "[{'role': 'user', 'content': 'a'}]"}, formats.MESSAGES, "messages is not valid JSON"),
        ({"messages": [USER, REPLY], "tools": "{"}, formats.MESSAGES, "tools is not valid JSON"),
    ],
)
def test_wrong_rows(row, name, message):
    with pytest.raises(ValueError, match=message):
        normalise(row, name)


@pytest.mark.parametrize(("row", "name"), [(row, name) for row, name in ROWS if name])
def test_every_format_reaches_a_batch(make_tokenizer, row, name):
    """Each format goes through the module it is for, and (but for text) gives prompts."""
    tokenizer = make_tokenizer("boundaries")
    modules = (SFTDataModule, PreferenceDataModule, UnpairedDataModule, PromptDataModule)
    module = next(module for module in modules if name in module.accepts)
    data = module(train=[row], test=[row], tokenizer=tokenizer)
    batch = next(iter(data.train_dataloader()))
    assert data.reports["train"]["format"] == name
    assert data.reports["train"]["kept"] == 1
    ends = [key for key in ("labels", "chosen_input_ids", "completion_input_ids") if key in batch]
    for key in ends:
        assert batch[key][0, -1] in (0, 4)  # the stop token is always there
    test = next(iter(data.test_dataloader()))
    assert ("prompts" in test) == (name != formats.TEXT)
    if name in (formats.PROMPT_COMPLETION, formats.MESSAGES, formats.SHAREGPT, formats.ALPACA):
        assert test["completion"] == ["b"]


def test_a_prompt_decoded_with_its_first_token_gets_no_second_one(make_tokenizer):
    encoder = Encoder(make_tokenizer(bos=True))
    assert len(encoder.first) == 1
    plain = encoder.prompts([Example(prompt="ab")])[0]
    again = encoder.prompts([Example(prompt="<bos>ab")])[0]  # as a decoded prompt begins
    assert again.tolist() == plain.tolist()


BINARIZED = {"prompt": "a", "chosen": [USER, REPLY], "rejected": [USER, OTHER], "messages": [USER, REPLY]}


@pytest.mark.parametrize(
    ("module", "row", "name"),
    [
        (SFTDataModule, BINARIZED, formats.MESSAGES),
        (PreferenceDataModule, BINARIZED, formats.PREFERENCE),
        (PretrainDataModule, {"prompt": "a", "chosen": "b", "rejected": "c", "text": "abc"}, formats.TEXT),
        (PreferenceDataModule, {**BINARIZED, "text": "abc"}, formats.PREFERENCE),
    ],
)
def test_the_format_is_one_that_the_module_takes(make_tokenizer, caplog, module, row, name):
    data = module(train=[row], test=[row], tokenizer=make_tokenizer("boundaries"))
    with caplog.at_level(logging.INFO, logger="datamodules"):
        data.setup("fit")
    assert data.reports["train"]["format"] == name
    assert f"format {name}," in caplog.text
    assert "prompts" in next(iter(data.test_dataloader()))


def test_completions_are_not_learnt_without_their_label(tokenizer):
    row = {"prompt": "a", "completion": "b", "label": False}
    with pytest.raises(ValueError, match="that is the format 'unpaired preference'; SFTDataModule needs"):
        SFTDataModule(train=[row], tokenizer=tokenizer).setup("fit")


def test_tables_invent_no_arguments(tmp_path):
    """Arrow gives each mapping the keys of all rows; the rows read from it equal the rows that were written."""
    import datasets

    def row(name, key):
        call = {"function": {"name": name, "arguments": {key: "1"}}}
        schema = {"name": name, "parameters": {"properties": {key: {"type": "string", "enum": ["1", "2"]}}}}
        messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, REPLY]
        return {"messages": messages, "tools": [{"type": "function", "function": schema}]}

    rows = [row("f", "a"), row("g", "b")]
    table = datasets.Dataset.from_list(rows)
    assert "b" in table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    for given, read in zip(rows, table, strict=True):
        example = normalise(read, formats.MESSAGES)
        assert (example.messages, example.tools) == (given["messages"], given["tools"])


QUESTION = "what is it"
SYSTEM = "be kind"
ANSWERS = {
    formats.PREFERENCE: {"chosen": "yes", "rejected": "no"},
    formats.SCORED: {"completions": ["yes", "no"], "rewards": [1, 0]},
    formats.UNPAIRED: {"completion": "yes", "label": True},
    formats.PROMPT_COMPLETION: {"completion": "yes"},
    formats.PROMPT: {"answer": 3},
}


@pytest.mark.parametrize("as_chat", [False, True])
@pytest.mark.parametrize("column", ["prompt", "question", "query", "instruction", "input"])
@pytest.mark.parametrize("name", ANSWERS)
def test_question_and_system_reach_the_prompt_of_every_format(name, column, as_chat):
    row = {column: QUESTION, "system": SYSTEM, **ANSWERS[name]}
    assert recognise(row) == name
    prompt = normalise(row, name, as_chat=as_chat).prompt
    said = " ".join(message["content"] for message in prompt) if as_chat else prompt
    assert said.index(SYSTEM) < said.index(QUESTION)
    assert isinstance(prompt, list) == as_chat


def test_input_belongs_to_its_instruction():
    row = {"instruction": "add", "input": "1 2", "chosen": "3", "rejected": "4"}
    assert "1 2" in normalise(row, formats.PREFERENCE).prompt
    assert normalise(row, formats.PREFERENCE, as_chat=True).prompt[-1]["content"] == "add\n\n1 2"


def test_a_prompt_that_contains_the_question_is_clear():
    row = {"prompt": "Q: what is it", "question": QUESTION}
    assert normalise(row, formats.PROMPT).prompt == row["prompt"]


def test_messages_in_the_wild():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    call = {"name": "f", "arguments": '{"x": null}'}
    rows = [
        [{"role": "Human", "content": parts}, {"role": "bot", "content": "b", "weight": 0}],
        json.dumps([{"from": "human", "value": "ab"}, {"from": "ai", "value": "b", "learn": False}]),
    ]
    for value in rows:
        messages = normalise({"messages": value}, formats.MESSAGES).messages
        assert messages == [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "b", "learn": False}]
    function = {"name": "f", "arguments": {"x": None}}
    for key, given in (("function_call", call), ("tool_calls", [{"type": "function", "function": call}])):
        messages = normalise({"messages": [USER, {"role": "assistant", "content": None, key: given}]}, formats.MESSAGES)
        reply = messages.messages[1]
        assert (reply["content"], reply["tool_calls"][0]["function"]) == ("", function)
        assert "calls " + reply["tool_calls"][0]["function"]["arguments"] == 'calls {"x": null}'


@pytest.mark.parametrize("template", ["boundaries", "markers"])
def test_marked_replies_are_not_learnt(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    row = {"messages": [USER, {**REPLY, "train": False}, USER, OTHER]}
    batch = next(iter(SFTDataModule(train=[row], tokenizer=tokenizer).train_dataloader()))
    labels = batch["labels"][0]
    assert tokenizer.convert_ids_to_tokens(labels[labels >= 0].tolist()) == ["c", "<|im_end|>"]


LABELS = [
    *((True, False), (1, 0), (1, -1), (np.bool_(True), np.bool_(False)), (np.int64(1), np.int64(0))),
    *((torch.tensor(True), torch.tensor(False)), ("good", "bad"), ("Desirable", "undesirable"), ("chosen", "rejected")),
]


@pytest.mark.parametrize("first", [{}, {"label": None}, None])
@pytest.mark.parametrize("labels", LABELS, ids=str)
@pytest.mark.parametrize("shape", [{"prompt": "a", "completion": "b"}, {"messages": [USER, REPLY]}])
def test_every_spelling_of_a_label_is_one(make_tokenizer, labels, first, shape):
    tokenizer = make_tokenizer("boundaries")
    rows = [{**shape, "label": label} for label in labels]
    if first is None:
        batch = next(iter(UnpairedDataModule(train=rows, tokenizer=tokenizer, shuffle=False).train_dataloader()))
        assert batch["label"].tolist() == [True, False]
    else:
        rows = [{**shape, **first}, *rows]
    with pytest.raises(ValueError, match="that is the format 'unpaired preference'; SFTDataModule needs"):
        SFTDataModule(train=rows, tokenizer=tokenizer).setup("fit")


def test_a_label_far_down_is_refused(tokenizer):
    rows = [{"prompt": "a", "completion": "b"}] * formats.SAMPLE + [{"prompt": "a", "completion": "b", "label": False}]
    with pytest.raises(ValueError, match=r"train: row 100 of .*: has a label of desirability"):
        SFTDataModule(train=rows, tokenizer=tokenizer).setup("fit")


def test_classes_are_no_labels(tokenizer, caplog):
    rows = [{"prompt": "a", "completion": "b", "label": number} for number in (0, 1, 2)]
    with caplog.at_level(logging.INFO, logger="datamodules"):
        SFTDataModule(train=rows, tokenizer=tokenizer).setup("fit")
    assert "column label holds no truth values" in caplog.text
