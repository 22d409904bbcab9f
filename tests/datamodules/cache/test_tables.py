"""Tables on disk: batches, fingerprints, reports and messages are those of tables in memory, at every start."""

import json
import logging
import pickle
import types

import numpy as np
import pytest

from datamodules import (
    CacheOptions,
    PreferenceDataModule,
    PretrainDataModule,
    PromptDataModule,
    SFTDataModule,
    UnpairedDataModule,
)
from datamodules.batching import Table
from datamodules.cache.forms import SourceColumn
from datamodules.rows import rows as row_tables

COUNT = 130
PLAIN = [{"prompt": f"{i}+{i}=", "completion": str(2 * i), "level": {"n": i}} for i in range(COUNT)]
LATE_WEIGHTS = [row | ({"weight": i % 3} if i > 60 else {}) for i, row in enumerate(PLAIN)]
UNEVEN = [row | {"completion": str(i) * (1 + i % 7)} for i, row in enumerate(PLAIN)]
PAIRS = [
    {"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + i % 2), "margin": i / 2} for i in range(COUNT)
]
TOOL = {"role": "system", "content": "ok"}
LATE_MASKS = [
    {
        "prompt": [{"role": "user", "content": str(i)}],
        "chosen": [{"role": "assistant", "content": "a"}, *([TOOL, TURN] if i > 60 else [])],
        "rejected": [{"role": "assistant", "content": "bb"}],
    }
    for i, TURN in enumerate([{"role": "assistant", "content": "c"}] * COUNT)
]
SCORED = [{"prompt": str(i), "completions": ["a", "b"], "rewards": [i % 3, 1]} for i in range(COUNT)]
LATE_COLUMN = [row | ({"extra": i} if i > 110 else {}) for i, row in enumerate(PLAIN)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}+{i}="}, {"role": "assistant", "content": str(2 * i)}]}
    for i in range(COUNT)
]
CASES = {
    "sft": (SFTDataModule, PLAIN, {}),
    "sft of chats": (SFTDataModule, CHATS, {}),
    "weights from the second part on": (SFTDataModule, LATE_WEIGHTS, {}),
    "packed weights": (SFTDataModule, LATE_WEIGHTS, {"packing": True, "max_length": 20}),
    "packed": (SFTDataModule, UNEVEN, {"packing": True, "max_length": 24}),
    "dropped": (SFTDataModule, UNEVEN, {"overflow": "drop", "max_length": 9}),
    "mostly too long": (SFTDataModule, UNEVEN, {"max_length": 5}),
    "carried": (SFTDataModule, PLAIN, {"carry": ["level", "prompt"]}),
    "documents": (PretrainDataModule, UNEVEN, {"max_length": 8}),
    "unpacked documents": (PretrainDataModule, UNEVEN, {"max_length": 8, "packing": False}),
    "prompts": (PromptDataModule, PLAIN, {}),
    "prompts of scored completions": (PromptDataModule, SCORED, {"max_length": 2}),
    "a column from the third part on": (PromptDataModule, LATE_COLUMN, {}),
    "prompts, renamed": (PromptDataModule, PLAIN, {"columns": {"level": "difficulty"}}),
    "pairs": (PreferenceDataModule, PAIRS, {}),
    "masks from the second part on": (PreferenceDataModule, LATE_MASKS, {}),
    "ties": (PreferenceDataModule, SCORED, {}),
    "unpaired": (UnpairedDataModule, PAIRS, {}),
    "a share": (SFTDataModule, PLAIN, {"validation": 0.4}),
}


def started(cls, tokenizer, options, **keywords):
    data = cls(tokenizer=tokenizer, cache=options, batch_size=16, **keywords)
    data.setup("fit")
    return data


@pytest.mark.parametrize("case", CASES)
def test_disk_and_memory_are_the_same(case, write, make_tokenizer, options, two, caplog, assert_same_batches):
    caplog.set_level(logging.INFO, "datamodules")
    (cls, rows, keywords), made, said = CASES[case], [], []
    tokenizer, path = make_tokenizer("boundaries"), write(rows)
    for cache in (None, two if case in ("sft", "prompts", "pairs") else options, options):
        caplog.clear()
        made.append(started(cls, tokenizer, cache, train=path, **keywords))
        said.append([record.getMessage() for record in caplog.records])
    memory, first, second = made
    assert type(first.train_dataloader().dataset.__reduce__()) is tuple
    for split in memory.reports:
        assert list(first.reports[split].items()) == list(memory.reports[split].items())
        assert first.reports[split] == second.reports[split]
        tables = [data._tables[split][0] for data in made]
        assert tables[0].fingerprint == tables[1].fingerprint == tables[2].fingerprint
        assert all((table.lengths == tables[0].lengths).all() for table in tables)
        known = [None if table.source_rows is None else table.source_rows.tolist() for table in tables]
        assert known[0] == known[1] == known[2]
    assert said[0] == said[1] == said[2]
    assert_same_batches(*(data.train_dataloader() for data in made))
    if "validation" in keywords:
        assert_same_batches(*(data.val_dataloader() for data in made))


@pytest.mark.parametrize("kind", ["list", "parquet", "csv", "dataset", "folder"])
def test_every_source_is_kept(kind, write, tmp_path, tokenizer, options, assert_same_batches, monkeypatch):
    import datasets
    import pyarrow.parquet

    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in PLAIN]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=40)
    elif kind == "csv":
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    elif kind == "folder":
        path.mkdir()
        (path / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:77])))
        (path / "b.jsonl").write_text("\n".join(map(json.dumps, rows[77:])))
    source = {"list": rows, "dataset": datasets.Dataset.from_list(rows)}.get(kind, str(path))
    made = [started(PromptDataModule, tokenizer, cache, train=source) for cache in (None, options)]
    monkeypatch.setattr(PromptDataModule, "build", None)  # a second start does not
    made.append(started(PromptDataModule, tokenizer, options, train=source))
    assert_same_batches(*(data.train_dataloader() for data in made))


def test_a_second_start_does_not_read_the_source(write, tokenizer, options, monkeypatch):
    path = write(PLAIN)
    started(PromptDataModule, tokenizer, options, train=path)
    parsed = []
    parse = row_tables.parse_line
    monkeypatch.setattr(row_tables, "parse_line", lambda *args, **kw: parsed.append(args) or parse(*args, **kw))
    again = started(PromptDataModule, tokenizer, options, train=path)
    assert len(parsed) <= 201  # the first hundred, to recognise the format
    batch = again.train_dataloader().dataset[[129, 3]]
    assert [row["level"] for row in batch] == [{"n": 129}, {"n": 3}]


def test_views_of_validation_and_test(write, make_tokenizer, options, assert_same_batches):
    path = write(PLAIN)
    made = []
    for cache in (None, options, options):
        data = SFTDataModule(
            train=path, validation=path, test=path, tokenizer=make_tokenizer(), cache=cache, test_targets=True
        )
        data.trainer = types.SimpleNamespace(
            lightning_module=types.SimpleNamespace(generates=True),
            progress_bar_callback=None,
            distributed_sampler_kwargs=None,
        )
        data.setup("fit"), data.setup("test")
        made.append(data)
    for loaders in zip(*(data.val_dataloader() for data in made), strict=True):
        assert_same_batches(*loaders)
    for loaders in zip(*(data.test_dataloader() for data in made), strict=True):
        assert_same_batches(*loaders)
    assert len(made[0].test_dataloader()) == 2
    assert made[0].first_prompts(5)["prompt"] == made[1].first_prompts(5)["prompt"]


def test_a_checkpoint_of_one_resumes_with_the_other(write, tokenizer, options, assert_same_batches):
    path = write(PLAIN)
    memory, disk = (started(SFTDataModule, tokenizer, cache, train=path) for cache in (None, options))
    loader = memory.train_dataloader()
    batches = iter(loader)
    next(batches), next(batches)
    resumed = disk.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert_same_batches(batches, resumed)


@pytest.mark.parametrize(
    ("cls", "change", "keywords"),
    [
        (SFTDataModule, {"completion": None}, {}),
        (SFTDataModule, {"label": True}, {}),
        (SFTDataModule, {"weight": "heavy"}, {}),
        (SFTDataModule, {"level": None}, {"carry": ["level"]}),
        (PromptDataModule, {"rewards": 1}, {}),
        (SFTDataModule, {"completion": "1" * 40}, {"overflow": "error", "max_length": 20}),
    ],
)
def test_the_first_bad_row_is_named(cls, change, keywords, write, tokenizer, two):
    rows = [row | (change if number in (77, 78, 125) else {}) for number, row in enumerate(PLAIN)]
    path = write(rows)
    with pytest.raises(ValueError, match="rows") as memory:
        started(cls, tokenizer, None, train=path, **keywords)
    with pytest.raises(ValueError, match="rows") as disk:
        started(cls, tokenizer, two, train=path, **keywords)
    assert str(disk.value) == str(memory.value)


def test_rows_that_lack_the_first_rows_margin(write, tokenizer, options):
    path = write([*PAIRS[:100], {**PAIRS[100], "margin": None}, *PAIRS[101:]])
    for cache in (None, options):
        with pytest.raises(ValueError, match=r"rows.jsonl:101: has no margin, and the first row has one"):
            started(PreferenceDataModule, tokenizer, cache, train=path)


def test_nothing_left(write, tokenizer, options):
    path = write(PLAIN)
    for cache in (None, options):
        with pytest.raises(ValueError, match="every row is longer than max_length=2 "):
            started(SFTDataModule, tokenizer, cache, train=path, max_length=2, overflow="drop")


def test_tables_are_sent_to_workers_as_paths(write, tokenizer, options):
    long = [row | {"completion": "123456789" * 100} for row in PLAIN]
    for cls in (SFTDataModule, PromptDataModule):
        data = started(cls, tokenizer, options, train=write(long))
        table = data.train_dataloader().dataset
        content = pickle.dumps(table)
        assert len(content) < 5000
        again = pickle.loads(content)
        assert str(again.row(100)) == str(table.row(100))


def test_small_splits_stay_in_memory(write, tokenizer, tmp_path):
    options = CacheOptions(folder=str(tmp_path / "cache"), least_rows=COUNT + 1)
    started(SFTDataModule, tokenizer, options, train=write(PLAIN))
    assert not (tmp_path / "cache").exists()


class ReversedDataModule(SFTDataModule):
    """Has a table of its own making."""

    def build(self, reader):
        table, collate = super().build(reader)
        table.tokens.values = table.tokens.values[::-1].copy()
        return table, collate


class SayingDataModule(ReversedDataModule):
    def table_options(self):
        return super().table_options() | {"reversed": True}


class OwnTable(Table):
    pass


class OwnTableDataModule(SFTDataModule):
    def build(self, reader):
        table, collate = super().build(reader)
        own = OwnTable()
        own.__dict__.update(table.__dict__)
        return own, collate

    def table_options(self):
        return {}


def test_a_class_of_ones_own_is_kept_where_it_says_what_counts(write, tokenizer, options, tmp_path, caplog):
    caplog.set_level(logging.INFO, "datamodules")
    path = write(PLAIN)
    started(ReversedDataModule, tokenizer, options, train=path)
    assert "cannot be compared later" in caplog.text
    before = len(list((tmp_path / "cache").iterdir()))
    started(SayingDataModule, tokenizer, options, train=path)
    assert len(list((tmp_path / "cache").iterdir())) == before + 1
    started(OwnTableDataModule, tokenizer, options, train=path)
    assert "OwnTable is no table of this library" in caplog.text
    assert len(list((tmp_path / "cache").iterdir())) == before + 1


def test_what_changes_a_table_is_in_its_key(write, make_tokenizer, options, tmp_path):
    path = write(PLAIN)
    seen = set()
    other = make_tokenizer("boundaries")
    other.add_tokens(["zz"])
    for cls, tokenizer, keywords in (
        (SFTDataModule, make_tokenizer("boundaries"), {}),
        (SFTDataModule, make_tokenizer("boundaries", bos=True), {}),
        (SFTDataModule, make_tokenizer("no stop"), {"as_chat": True}),
        (SFTDataModule, make_tokenizer("boundaries"), {"as_chat": True}),
        (SFTDataModule, other, {}),
        (SFTDataModule, make_tokenizer("boundaries"), {"max_length": 100}),
        (SFTDataModule, make_tokenizer("boundaries"), {"overflow": "drop"}),
        (SFTDataModule, make_tokenizer("boundaries"), {"loss_on": "all"}),
        (SFTDataModule, make_tokenizer("boundaries"), {"packing": True}),
        (SFTDataModule, make_tokenizer("boundaries"), {"carry": ["level"]}),
        (SFTDataModule, make_tokenizer("boundaries"), {"columns": {"level": "depth"}}),
        (PretrainDataModule, make_tokenizer("boundaries"), {}),
    ):
        started(cls, tokenizer, options, train=path, **keywords)
        now = {entry.name for entry in (tmp_path / "cache").iterdir() if entry.name != "locks"}
        assert now > seen, keywords
        seen = now
    used = make_tokenizer("boundaries")
    used(["a", "aaa"], padding=True, truncation=True, max_length=2) if used.pad_token else used(["a"])
    started(SFTDataModule, used, options, train=path)
    assert {entry.name for entry in (tmp_path / "cache").iterdir() if entry.name != "locks"} == seen


def test_a_column_of_the_source():
    column = SourceColumn([{"a": i} for i in range(5)], np.asarray([4, 2]), "a")
    assert list(column) == [4, 2]
