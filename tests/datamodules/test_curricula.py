"""Curricula and budgets of tokens as options of a data module: what they give, and what they refuse."""

import itertools
import json
from pathlib import Path

import pytest
import yaml

from datamodules import (
    ByColumn,
    ByLength,
    BySuccess,
    PreferenceDataModule,
    PretrainDataModule,
    PromptDataModule,
    SFTDataModule,
)

ROOT = Path(__file__).parents[2]
HUGE = 10**400
ROWS = [{"prompt": "1+" * (n % 7 + 1), "completion": "2" * (n % 5 + 1), "level": n % 3, "id": n} for n in range(60)]


def sft(tokenizer, rows=ROWS, **options):
    data = SFTDataModule(**{"train": rows, "tokenizer": tokenizer, "batch_size": 4, "carry": ["id"]} | options)
    data.setup("fit")
    return data


def epoch(data, number=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def lengths(batch):
    return batch["attention_mask"].sum(dim=1).tolist()


def test_a_budget_of_tokens(tokenizer):
    data = sft(tokenizer, max_tokens=60)
    for number in range(2):
        batches = epoch(data, number)
        assert len(batches) == len(data.train_dataloader())
        assert all(batch["input_ids"].numel() <= 60 for batch in batches)
        assert sorted(itertools.chain(*(batch["id"] for batch in batches))) == list(range(60))
    assert sum(int((batch["attention_mask"] == 0).sum()) for batch in batches) < 0.1 * 60 * len(batches)


def test_a_budget_counts_all_of_a_row(tokenizer):
    pairs = [{"prompt": "1" * n, "chosen": "22", "rejected": "3" * n} for n in range(1, 11)]
    data = PreferenceDataModule(train=pairs, tokenizer=tokenizer, max_tokens=60)
    data.setup("fit")
    names = [f"{side}_attention_mask" for side in ("prompt", "chosen", "rejected")]
    for batch in epoch(data):
        tokens = sum(batch[name].sum(dim=1) for name in names)
        assert len(tokens) * int(tokens.max()) <= 60


def test_a_row_beyond_the_budget_is_named(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "1", "completion": "2"},
        {"prompt": "3", "completion": "4"},
        {"prompt": "1" * 30, "completion": "2"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=rf"train: {path}:3 has 32 tokens, max_tokens=20; raise it, or lower max_le"):
        sft(tokenizer, str(path), max_tokens=20, carry=None)
    with pytest.raises(ValueError, match=r"train: packed row \d has \d+ tokens, max_tokens=20"):
        sft(tokenizer, max_tokens=20, packing=True, max_length=40, carry=None)


def test_packed_rows_within_a_budget(tokenizer):
    data = sft(tokenizer, max_tokens=80, packing=True, max_length=40, carry=None)
    assert {len(batch["input_ids"]) for batch in epoch(data)[:-1]} == {2}


def test_rows_sorted_by_a_column(tokenizer):
    data = sft(tokenizer, curriculum=ByColumn(column="level"))
    first, second = ([i for batch in epoch(data, number) for i in batch["id"]] for number in (0, 1))
    assert [i % 3 for i in first] == [i % 3 for i in second] == [0] * 20 + [1] * 20 + [2] * 20
    assert sorted(first) == list(range(60))
    assert first != second
    data = sft(tokenizer, curriculum=ByColumn(column="level", descending=True))
    assert [i % 3 for batch in epoch(data) for i in batch["id"]] == [2] * 20 + [1] * 20 + [0] * 20


def test_rows_sorted_by_length_within_a_budget(tokenizer):
    batches = epoch(sft(tokenizer, curriculum=ByLength(), max_tokens=60))
    found = [length for batch in batches for length in lengths(batch)]
    assert found == sorted(found)
    assert all(batch["input_ids"].numel() <= 60 for batch in batches)


def test_short_rows_are_admitted_first(tokenizer):
    data = sft(tokenizer, curriculum=ByLength(mode="admission", start=0.3, steps=20))
    longest = [max(lengths(batch)) for number in (0, 1) for batch in epoch(data, number)]
    plain = sorted(length for batch in epoch(sft(tokenizer)) for length in lengths(batch))
    assert longest[0] <= plain[17]
    assert max(longest[20:]) == plain[-1]
    # with the steps over all rows come once
    assert sorted(i for batch in epoch(data, 2) for i in batch["id"]) == list(range(60))


@pytest.mark.parametrize(
    "wrong", ["hard", None, float("nan"), 10**400, True, [1]], ids=lambda value: type(value).__name__
)
def test_a_row_without_a_number_is_named(tokenizer, wrong):
    rows = [*ROWS[:5], ROWS[5] | {"level": wrong}]
    with pytest.raises(ValueError, match=r"train: row 5 of .* has .* in column 'level', which the curriculum ranks"):
        sft(tokenizer, rows, curriculum=ByColumn(column="level"))
    with pytest.raises(ValueError, match=r"train: row 0 of .* has none in column 'difficulty'"):
        sft(tokenizer, curriculum=ByColumn(column="difficulty"))


def test_a_column_under_a_new_name(tokenizer):
    data = sft(tokenizer, columns={"level": "hardness"}, curriculum=ByColumn(column="hardness"))
    assert [i % 3 for batch in epoch(data) for i in batch["id"]] == [0] * 20 + [1] * 20 + [2] * 20


def test_dropped_rows_do_not_shift_a_column(tokenizer):
    rows = [row | {"prompt": "1" * 99} if row["id"] % 4 == 0 else row for row in ROWS]
    data = sft(tokenizer, rows, max_length=30, overflow="drop", curriculum=ByColumn(column="level"))
    found = [i for batch in epoch(data) for i in batch["id"]]
    assert [i % 3 for i in found] == sorted(i % 3 for i in range(60) if i % 4)


def test_success_is_told_by_the_numbers_of_the_source(tokenizer):
    rows = [{"prompt": "1" * (99 if n < 5 else n), "answer": "1"} for n in range(1, 25)]
    options = {"max_length": 30, "overflow": "drop", "batch_size": 4, "curriculum": BySuccess(revisit=0.01)}
    data = PromptDataModule(train=rows, tokenizer=tokenizer, **options)
    assert data.record([7], [1.0]) == {}  # nothing was drawn yet
    data.setup("fit")
    loader = data.train_dataloader()
    batches = iter(loader)
    first = next(batches)["index"]
    assert min(first) >= 4
    other = next(index for index in range(4, 24) if index not in first)
    told = data.record([*first, other], [1.0, 0.5, 0.5, 0.0, 1.0])
    assert told == {"set_aside": 3 / 20, "mean_score": 0.6}
    later = [index for batch in batches for index in batch["index"]]
    assert not {first[0], first[3], other} & set(later)
    with pytest.raises(ValueError, match="index: 2 is the number of no training row"):
        data.record([2], [1.0])


REFUSED = {
    "no curriculum": (SFTDataModule, {"curriculum": "ByLength"}, r"curriculum='ByLength' must be a Curriculum"),
    "an order that is kept": (
        SFTDataModule,
        {"curriculum": ByLength(), "shuffle": False},
        r"shuffle=False keeps ",
    ),
    "lengths that are kept": (
        SFTDataModule,
        {"max_tokens": 9, "shuffle": False},
        r"shuffle=False keeps .* max_tok",
    ),
    "full batches of tokens": (
        SFTDataModule,
        {"max_tokens": 9, "drop_last": True},
        r"drop_last=True with max_tok",
    ),
    "tokens of prompts": (PromptDataModule, {"max_tokens": 9}, r"max_tokens=9 counts tokens that are given"),
    "rewards of demonstrations": (SFTDataModule, {"curriculum": BySuccess()}, r"BySuccess.* needs to be told rewards"),
    "packed": (SFTDataModule, {"curriculum": ByLength(), "packing": True}, r"packing=True .* set packing=False"),
    "packed text": (PretrainDataModule, {"curriculum": ByLength()}, r"packing=True .* set packing=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_contradict_each_other(tokenizer, case):
    kind, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        kind(train=ROWS, tokenizer=tokenizer, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByLength(mode="admission"), "steps=None with mode='admission'"),
        (lambda: ByLength(start=0.5), "start=0.5 has no effect with mode='sorted'"),
        (lambda: ByColumn(column="x", steps=5), "steps=5 has no effect with mode='sorted'"),
        (lambda: BySuccess(low=0.9, high=0.9), "low=0.9 must be less than high=0.9"),
    ],
)
def test_options_of_curricula(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_the_rows(tokenizer):
    data = sft(tokenizer, drop_last=True, curriculum=ByLength())
    with pytest.raises(ValueError, match=r"drop_last=True with curriculum=ByLength.* would leave out its last rows"):
        data.train_dataloader()
    data = sft(tokenizer, curriculum=ByLength(mode="admission", start=0.01, steps=5))
    with pytest.raises(ValueError, match=r"start=0.01 admits 1 of 60 rows, fewer than the 4 of a batch"):
        data.train_dataloader()


def test_what_the_page_shows():
    section = (ROOT / "docs" / "data.md").read_text().partition("## Curricula\n")[2]
    found = {}
    exec(section.partition("```python\n")[2].partition("```")[0], found)
    assert str(found["data"].curriculum) == "ByColumn(column='level', mode='sorted', descending=False)"


def test_the_overlay():
    from datamodules import curricula

    given = yaml.safe_load((ROOT / "configs" / "data" / "curriculum.yaml").read_text())["data"]["init_args"][
        "curriculum"
    ]
    made = getattr(curricula, given["class_path"])(**given["init_args"])
    assert str(made) == str(BySuccess())
