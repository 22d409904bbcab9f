"""Completions with labels: batches, labels of every kind, pairs that are split, and what is refused."""

import logging

import numpy as np
import pytest
import torch

from datamodules import PreferenceDataModule, PromptDataModule, UnpairedDataModule

USER = {"role": "user", "content": "ab"}


def reply(text):
    return {"role": "assistant", "content": text}


def make(rows, tokenizer, **options):
    data = UnpairedDataModule(train=rows, tokenizer=tokenizer, **({"shuffle": False, "batch_size": 16} | options))
    (batch,) = data.train_dataloader()
    return data, batch


def test_a_batch(tokenizer):
    rows = [{"prompt": "a", "completion": "bc", "label": True}, {"prompt": "ab", "completion": "c", "label": False}]
    data, batch = make(rows, tokenizer)
    assert batch.keys() == {
        "prompt_input_ids", "prompt_attention_mask", "completion_input_ids", "completion_attention_mask", "label",
        "index",
    }  # fmt: skip
    assert batch["label"].dtype == torch.bool
    assert batch["label"].tolist() == [True, False]
    assert batch["prompt_attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert batch["completion_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["completion_input_ids"][0, -1] == tokenizer.eos_token_id
    assert batch["index"] == [0, 1]
    assert data.reports["train"]["desirable"] == data.reports["train"]["undesirable"] == 1


@pytest.mark.parametrize(
    ("yes", "no"),
    [(True, False), (1, 0), (1, -1), ("good", "Bad"), ("true", "false"), (np.bool_(True), np.int64(0))],
)
def test_labels(tokenizer, yes, no):
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (no, yes, yes)]
    assert make(rows, tokenizer)[1]["label"].tolist() == [False, True, True]


def test_messages_and_whole_conversations(make_tokenizer, read):
    tokenizer = make_tokenizer("boundaries")
    rows = [
        {"prompt": [USER], "completion": [reply("c")], "label": True},
        {"messages": [USER, reply("d")], "label": False},
    ]
    for number, row in enumerate(rows):
        batch = make([row], tokenizer)[1]
        assert read(tokenizer, batch["completion_input_ids"][0]) == ("c<|im_end|>", "d<|im_end|>")[number]
        assert read(tokenizer, batch["prompt_input_ids"][0]).endswith("assistant\n")


def test_only_the_assistants_words_are_scored(make_tokenizer, read):
    tokenizer = make_tokenizer("boundaries")
    rows = [{"prompt": [USER], "completion": [reply("c"), USER, reply("d")], "label": True}]
    batch = make(rows, tokenizer)[1]
    scored = batch["completion_input_ids"][batch["completion_loss_mask"].bool()]
    assert read(tokenizer, scored) == "c<|im_end|>d<|im_end|>"
    assert batch["completion_loss_mask"].dtype == torch.int64


PAIRS = {
    "preference": [
        {"prompt": "a", "chosen": "bc", "rejected": "d"},
        {"prompt": "b", "chosen": "c", "rejected": "c"},
        {"prompt": "c", "chosen": "d", "rejected": "ef"},
    ],
    "preference with implicit prompt": [
        {"chosen": [USER, reply("bc")], "rejected": [USER, reply("d")]},
        {"chosen": [USER, reply("c")], "rejected": [USER, reply("c")]},
        {"chosen": [USER, reply("d")], "rejected": [USER, reply("ef")]},
    ],
    "scored completions": [
        {"prompt": "a", "completions": ["d", "bc"], "rewards": [0, 1]},
        {"prompt": "b", "completions": ["c", "d"], "rewards": [1, 1]},
        {"prompt": "c", "completions": ["d", "ef", "g"], "rewards": [2, 0, 1]},
    ],
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_split(make_tokenizer, caplog, kind):
    tokenizer = make_tokenizer("boundaries")
    pairs = PreferenceDataModule(train=PAIRS[kind], tokenizer=tokenizer, shuffle=False)
    expected = next(iter(pairs.train_dataloader()))
    with caplog.at_level(logging.INFO):
        data, batch = make(PAIRS[kind], tokenizer)
    assert f"format {kind}, each row split into two completions" in caplog.text
    assert batch["label"].tolist() == [True, False, True, False]
    assert batch["index"] == [0, 1, 4, 5]
    assert data.reports["train"]["kept"] == 4
    for row, name, number in ((0, "chosen", 0), (1, "rejected", 0), (2, "chosen", 1), (3, "rejected", 1)):
        for ours, theirs, at in (("completion", name, number), ("prompt", "prompt", number)):
            mine = batch[f"{ours}_input_ids"][row][batch[f"{ours}_attention_mask"][row].bool()]
            other = expected[f"{theirs}_input_ids"][at][expected[f"{theirs}_attention_mask"][at].bool()]
            assert mine.tolist() == other.tolist()


def test_each_completion_is_cut_by_itself(tokenizer):
    rows = [{"prompt": "a" * 6, "chosen": "b" * 9, "rejected": "c"}]
    batch = make(rows, tokenizer, max_length=8)[1]
    assert batch["prompt_attention_mask"].sum(dim=1).tolist() == [4, 6]
    assert batch["completion_attention_mask"].sum(dim=1).tolist() == [4, 2]
    data, batch = make(rows, tokenizer, max_length=8, overflow="drop")
    assert (batch["label"].tolist(), batch["index"]) == ([False], [1])
    assert data.reports["train"]["dropped_too_long"] == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "completion": "b"}], "UnpairedDataModule needs"),
        ([{"prompt": "a", "completion": "b", "label": "hard"}], "UnpairedDataModule needs"),
        ([{"prompt": "a", "completion": "b", "label": 1}, {"prompt": "a", "completion": "b"}], "row 1 .*label must be"),
        ([{"messages": [USER], "label": 1}], "no assistant message that the label could be about"),
    ],
)
def test_what_is_refused(make_tokenizer, rows, said):
    with pytest.raises(ValueError, match=said):
        make(rows, make_tokenizer("boundaries"))


def test_labelled_completions_are_no_pairs(tokenizer):
    rows = [{"prompt": "a", "completion": "b", "label": True}]
    with pytest.raises(ValueError, match="that is the format 'unpaired preference'; PreferenceDataModule needs"):
        PreferenceDataModule(train=rows, tokenizer=tokenizer).setup("fit")


def test_other_splits_are_prompts(tokenizer):
    rows = [{"prompt": "a", "completion": "b", "label": True}]
    ours, theirs = (
        next(iter(module(test=rows, tokenizer=tokenizer).test_dataloader()))
        for module in (UnpairedDataModule, PromptDataModule)
    )
    assert ours["prompts"].tolist() == theirs["prompts"].tolist()
    assert ours["label"] == [True]
