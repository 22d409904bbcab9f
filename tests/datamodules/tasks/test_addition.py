"""The addition task: disjoint splits, right answers, graded mistakes, and a tokenizer that keeps every character."""

import numpy as np
import pytest

from datamodules.tasks import (
    AdditionCorpus,
    AdditionInstructions,
    AdditionPrompts,
    character_tokenizer,
    split_of,
    write_sums,
)


def _value(text):
    return int(text[::-1])


def test_splits_are_disjoint_for_all_seeds_and_kinds():
    def all_of(split):
        found = set()
        for seed in (0, 1, 2):
            found |= AdditionCorpus(split=split, size=20_000, seed=seed).problems()
            found |= AdditionInstructions(split=split, size=500, seed=seed).problems()
            found |= AdditionPrompts(split=split, size=2_000, seed=seed).problems()
        return found

    train, validation, test = (all_of(split) for split in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert min(map(len, (train, validation, test))) > 2_000


def test_split_ignores_the_order_of_the_summands_and_has_the_stated_shares():
    first, second = np.divmod(np.arange(1_000_000), 1_000)
    split = split_of(first, second)
    assert np.array_equal(split, split_of(second, first))
    shares = np.bincount(split) / len(split)
    assert shares == pytest.approx([0.85, 0.05, 0.10], abs=0.002)


def test_a_thousand_distinct_test_problems():
    prompts = AdditionPrompts(split="test", size=1_000)
    assert len(prompts) == len(prompts.problems()) == 1_000
    assert len({row["prompt"][0]["content"] for row in prompts}) == 1_000


@pytest.mark.parametrize("make", [AdditionCorpus, AdditionInstructions, AdditionPrompts])
def test_rows_depend_on_the_seed_alone(make):
    def rows(seed):
        return list(make(split="train", size=50, seed=seed))

    assert rows(3) == rows(3)
    assert rows(3) != rows(4)


def test_answers_are_sums_with_units_first():
    for row in AdditionPrompts(split="validation", size=200):
        first, second = row["prompt"][0]["content"].split("+")
        assert len(first) == len(second) == 3
        assert _value(first) + _value(second) == _value(row["answer"])
    line = AdditionPrompts(split="test", size=1, chat=False)[0]
    assert line["prompt"] == "".join((AdditionPrompts(split="test", size=1)[0]["prompt"][0]["content"], "="))


def test_corpus_has_wrong_lines_and_only_of_the_stated_kind():
    corpus = AdditionCorpus(split="train", size=20_000, seed=1)
    wrong = []
    for row, right in zip(corpus, corpus.right, strict=True):
        problem, answer = row["text"].split("=")
        missing = sum(map(_value, problem.split("+"))) - _value(answer)
        assert (missing == 0) == right
        if missing:
            wrong.append(missing)
    assert 0.18 < len(wrong) / len(corpus) < 0.28
    # a carry forgotten in the tens loses 10, in the hundreds 100
    assert set(wrong) == {10, 100, 110}
    assert AdditionCorpus(split="train", size=2_000, carelessness=0.0).right.all()


def test_slips_grow_with_the_lower_digit():
    for lower, rate in ((0, 0.185), (4, 0.465), (9, 0.815)):
        second = np.full(20_000, 10 * lower + 9)
        written, right = write_sums(np.full(20_000, 1), second, digits=2, carelessness=1.0, seed=5)
        assert 1 - right.mean() == pytest.approx(rate, abs=0.015)
        assert set(written.tolist()) == {10 * lower, 10 * lower + 10}


def test_small_numbers_are_common_in_the_corpus():
    short = AdditionCorpus(split="train", size=5_000)
    even = AdditionCorpus(split="train", size=5_000, short=False)
    assert (short.first < 100).mean() > 0.6
    assert (even.first < 100).mean() < 0.15


def test_tokenizer_round_trip_and_chat_mask():
    tokenizer = AdditionCorpus(split="train", size=1).tokenizer
    ids = tokenizer("743+685=3390")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 13
    assert tokenizer.decode(ids, skip_special_tokens=True) == "743+685=3390"
    messages = AdditionInstructions(split="train", size=1)[0]["messages"]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [i for i, kept in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if kept]
    assert tokenizer.decode(learned) == messages[1]["content"] + "<eos>"
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1


def test_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "1+2"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert loaded("743+685=")["input_ids"] == tokenizer("743+685=")["input_ids"]
    assert loaded.decode(loaded("743+685=")["input_ids"]) == "<bos>743+685="
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev", "size": 1}, "split='dev' must be 'train' or 'validation' or 'test'"),
        ({"split": "test", "size": 0}, "size=0"),
        ({"split": "test", "size": 1, "digits": 9}, "digits=9 must be an integer from 1 to 8"),
        ({"split": "test", "size": 1, "seed": -1}, "seed=-1"),
        ({"split": "test", "size": 1_000, "digits": 1}, "size=1000: the test split of numbers of 1 digits has about"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        AdditionPrompts(**options)


def test_bad_carelessness():
    with pytest.raises(ValueError, match=r"carelessness=1.5 must be a finite number from 0 to 1"):
        AdditionCorpus(split="train", size=1, carelessness=1.5)
    with pytest.raises(ValueError, match="each once"):
        character_tokenizer("aa")
