"""The hidden number: disjoint splits, players as careful as stated, rows that train on the player's turns alone."""

import numpy as np
import pytest
from transformers.utils import get_json_schema

from datamodules import SFTDataModule
from datamodules.tasks import (
    HiddenNumber,
    HiddenNumberEpisodes,
    HiddenNumberNotes,
    HiddenNumberPrompts,
    question_tokenizer,
    read_questions,
)
from datamodules.tasks.searches import MOST_QUESTIONS, draw_searches, play


def test_splits_are_disjoint_for_all_seeds_and_kinds():
    def all_of(split):
        found = set()
        for seed in (0, 1, 2):
            found |= set(HiddenNumberNotes(split=split, size=3_000, seed=seed).searches)
            found |= set(HiddenNumberEpisodes(split=split, size=300, seed=seed).searches)
            found |= set(HiddenNumberPrompts(split=split, size=500, seed=seed).searches)
        return found

    train, validation, test = (all_of(split) for split in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert min(map(len, (train, validation, test))) > 1_000


def test_ranges_are_as_wide_as_stated_and_hold_the_number():
    searches = draw_searches(split="train", size=2_000, seed=0, width=32, distinct=True)
    assert len(set(searches)) == 2_000
    assert {high - low + 1 for low, high, _ in searches} == {*range(17, 33)}
    assert all(10 <= low <= number <= high <= 99 for low, high, number in searches)


@pytest.mark.parametrize("make", [HiddenNumberNotes, HiddenNumberEpisodes, HiddenNumberPrompts])
def test_rows_depend_on_the_seed_alone(make):
    def rows(seed):
        return list(make(split="train", size=50, seed=seed))

    assert rows(3) == rows(3)
    assert rows(3) != rows(4)


def test_a_careful_player_halves_the_range_and_is_right():
    """With no more questions than bits: nobody can do with fewer on all numbers."""
    rng = np.random.default_rng(0)
    for search in draw_searches(split="test", size=300, seed=0, width=32, distinct=True):
        asked, answer = play(search, 0.0, rng)
        assert answer == search.number
        assert len(asked) <= 5


def test_careless_players_are_mostly_wrong_and_ask_more():
    notes = HiddenNumberNotes(split="train", size=2_000, seed=5)
    right = np.array(notes.right())
    questions = np.array([len(asked) for asked, _ in notes.plays])
    assert 0.35 < right.mean() < 0.45
    assert questions[right].mean() > 6
    assert questions.max() == MOST_QUESTIONS
    for search, (asked, answer) in zip(notes.searches, notes.plays, strict=True):
        low, high = search.low, search.high
        for one in asked:
            low, high = (one.number + 1, high) if search.number > one.number >= low else (low, high)
            low, high = (low, one.number) if search.number <= one.number <= high else (low, high)
            assert (one.low, one.high) == (low, high)
        assert low == high
        assert answer - low in (0, 1)


def test_the_environment_answers_and_counts():
    hidden = HiddenNumber(price=0.25)
    assert hidden.reset(low=12, high=43, number=20) is None
    assert [hidden.ask(number) for number in (5, 30, 40, 19, 20)] == ["12-43", "12-30", "12-30", "20-30", "20-20"]
    assert hidden.get_reward() == -1.25
    hidden.reset(low=12, high=43, number=30)
    assert hidden.get_reward() == 0
    with pytest.raises(ValueError, match="price=-1"):
        HiddenNumber(price=-1)


@pytest.mark.parametrize("text", ["?", "?3 3", "3?", "??33", "?-3", "?33?34", "?1234567890", "?33=", "?33\n"])
def test_anything_but_one_question_is_malformed(text):
    with pytest.raises(ValueError, match="is no question such as"):
        read_questions(text)


@pytest.mark.parametrize("text", ["", "29", "=29", "33>"])
def test_without_a_question_mark_it_is_an_answer(text):
    assert read_questions(text) == []


def test_demonstrations_train_on_the_player_alone():
    episodes = HiddenNumberEpisodes(split="train", size=8, seed=2)
    assert episodes[0]["tools"] == [get_json_schema(HiddenNumber().ask)]
    data = SFTDataModule(train=episodes, batch_size=1, max_length=160, shuffle=False)
    data.setup("fit")
    for row, batch in zip(episodes, data.train_dataloader(), strict=True):
        turns = [message for message in row["messages"] if message["role"] == "assistant"]
        calls = [call["function"]["arguments"]["number"] for one in turns[:-1] for call in one["tool_calls"]]
        written = "".join(f"?{number}<eos>" for number in calls) + f"{turns[-1]['content']}<eos>"
        labels = batch["labels"][0]
        assert episodes.tokenizer.decode(labels[labels >= 0]) == written


def test_conversations_hold_what_the_notes_hold():
    """The same players ask the same, in both forms; the tokenizer knows every character."""
    options = {"split": "train", "size": 20, "seed": 7}
    notes, episodes, tokenizer = HiddenNumberNotes(**options), HiddenNumberEpisodes(**options), question_tokenizer()
    for note, row in zip(notes, episodes, strict=True):
        text = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
        plain = text.replace("<eos><tool>", ">").replace("<bos><tool>ask<user>", "").removesuffix("<eos>")
        head, _, answer = plain.rpartition("<assistant>")
        assert f"{head}={answer}".replace("<assistant>", "") == note["text"]
        for written in (text, note["text"]):
            assert tokenizer.unk_token_id not in tokenizer(written, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev", "size": 1}, "split='dev' must be 'train' or 'validation' or 'test'"),
        ({"split": "test", "size": 0}, "size=0"),
        ({"split": "test", "size": 1, "width": 1}, "width=1 must be an integer from 2 to 90"),
        ({"split": "test", "size": 5_000}, "size=5000: the test split of ranges of at most 32 numbers has"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HiddenNumberPrompts(**options)


def test_bad_carelessness():
    with pytest.raises(ValueError, match=r"carelessness=1.5 must be a finite number from 0 to 1"):
        HiddenNumberEpisodes(split="train", size=1, carelessness=1.5)
