"""Streams of training rows: the batches of the table path, dealt without repeats, counted."""

import itertools
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

from datamodules import (
    PreferenceDataModule,
    PretrainDataModule,
    PromptDataModule,
    SFTDataModule,
    StreamOptions,
    UnpairedDataModule,
)
from tests.datamodules.streams.streamed import ROWS, Numbers

ROOT = Path(__file__).parents[3]


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


@pytest.mark.parametrize("module", ROWS)
@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.parquet", "datasets", "saved"])
def test_batches_are_those_of_the_table(module, kind, loader, write, tokenizer, tmp_path):
    rows = ROWS[module]
    options = {"packing": False} if module is PretrainDataModule else {}
    table = module(train=rows, tokenizer=tokenizer, batch_size=4, max_length=24, shuffle=False, **options)
    if kind == "datasets":
        source = datasets.Dataset.from_list(rows).to_iterable_dataset()
    elif kind == "saved":
        source = str(tmp_path / "saved")
        datasets.Dataset.from_list(rows).save_to_disk(source)
    else:
        source = write(rows, kind)
    stream = loader(source, module, **options)
    for expected, found in zip(list(table.train_dataloader())[:9], stream, strict=False):  # the tenth is not full
        same(expected, found)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_comes_once_a_pass_whoever_reads_it(workers, ranks, loader, write):
    path = write(ROWS[PromptDataModule] + ROWS[PromptDataModule][:3], "rows.jsonl")
    seen = []
    for rank in range(ranks):
        batches = loader(path, PromptDataModule, rank, ranks, num_workers=workers, shuffle=True, batch_size=5)
        count = 40 // 5 // ranks
        rows = [i for batch in itertools.islice(batches, count) for i in batch["index"]]
        assert {i % ranks for i in rows} == {rank}  # as a table deals them
        seen += rows
    assert sorted(seen) == list(range(40)) != seen


def test_ranks_together_read_the_batches_of_one_process(loader, write):
    path = write(ROWS[PromptDataModule])
    one = [batch["index"] for batch in itertools.islice(loader(path, PromptDataModule, batch_size=6), 6)]
    ranks = [itertools.islice(loader(path, PromptDataModule, rank, 3, batch_size=2), 6) for rank in range(3)]
    for together, *parts in zip(one, *ranks, strict=True):
        assert sorted(i for part in parts for i in part["index"]) == together


def test_passes_and_blocks_have_orders_of_their_own(loader, write):
    path = write(ROWS[PromptDataModule][:20])

    def passes(**options):
        batches = loader(path, PromptDataModule, shuffle=True, batch_size=10, **options)
        return [batch["index"] for batch in itertools.islice(batches, 4)]

    first, second, *others = passes()
    assert sorted(first) == list(range(10)) != first
    assert [i - 10 for i in second] != first
    assert others[0] != first
    assert passes() == [first, second, *others]
    assert passes(seed=1) != [first, second, *others]


def test_validation_of_a_streams_first_rows(tokenizer):
    options = {"train": Numbers(), "validation": Numbers(), "tokenizer": tokenizer}
    with pytest.raises(ValueError, match=r"validation=Numbers is a stream, which may .*; set stream.eval_rows"):
        SFTDataModule(**options).setup("fit")
    data = SFTDataModule(**options, stream=StreamOptions(eval_rows=5))
    data.setup("fit")
    assert data.reports["validation"]["rows"] == 5
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 5


def test_counts_of_what_is_lost_are_logged_and_kept(loader, write, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr("datamodules.streams.stream._FIRST_REPORT", 40)
    rows = [{"prompt": "1=", "completion": "1" if n % 4 else "1" * 50} for n in range(120)]
    data = SFTDataModule(
        train=write(rows), tokenizer=tokenizer, max_length=24, overflow="drop", stream=StreamOptions(20), batch_size=4
    )
    data.setup("fit")
    made = data.train_dataloader()
    with caplog.at_level(logging.WARNING):
        list(itertools.islice(made, 30))
    assert data.reports["train"]["dropped_too_long"] * 4 == data.reports["train"]["rows"] == 160
    assert data.reports["train"]["passes"] == 1
    logged = [record.message for record in caplog.records if "read so far by rank 0" in record.message]
    assert len(logged) == 3
    assert "dropped too long 10" in logged[0]
    resumed = data.train_dataloader()
    resumed.load_state_dict(made.state_dict())
    next(iter(resumed))
    assert data.reports["train"]["rows"] == 180  # counted on
    assert data.reports["train"]["dropped_too_long"] == 45


def test_rows_of_several_blocks_have_the_same_keys(loader, write):
    rows = [{"prompt": "1=", "completion": "1", **({"weight": 2.0} if n == 3 else {})} for n in range(8)]
    batches = list(itertools.islice(loader(write(rows), buffer_size=2, batch_size=8), 2))
    assert batches[0]["loss_weights"].sum(1).tolist() == [2, 2, 2, 4, 2, 2, 2, 2]
    rows = [{"prompt": f"{n}=", **({"answer": n} if n > 100 else {})} for n in range(120)]
    batches = list(itertools.islice(loader(write(rows), PromptDataModule, batch_size=10, buffer_size=5), 12))
    assert "answer" not in batches[0]
    assert batches[10]["answer"] == [None, *range(101, 110)]
    rows = [{"prompt": f"{n}=", "chosen": "1", "rejected": "2", **({"margin": 1} if n < 3 else {})} for n in range(6)]
    with pytest.raises(ValueError, match="has no margin, and the first row has one"):
        loader(write(rows), PreferenceDataModule, buffer_size=3)
    rows = [{**rows[0], "margin": 1} if n < 110 else {**rows[5]} for n in range(120)]
    with pytest.raises(ValueError, match="has no margin, and the first rows or its neighbours have"):
        list(itertools.islice(loader(write(rows), PreferenceDataModule, buffer_size=10), 40))


def test_numbers_of_rows_that_are_split(loader, write):
    found = list(itertools.islice(loader(write(ROWS[PreferenceDataModule]), UnpairedDataModule, buffer_size=3), 8))
    assert [i for batch in found for i in batch["index"]] == list(range(32))


def test_columns_are_renamed(loader, write):
    rows = [{"q": f"{n}=", "completion": "1"} for n in range(9)]
    made = loader(write(rows), columns={"q": "prompt"}, buffer_size=2)
    assert next(iter(made))["input_ids"].shape[0] == 4
    with pytest.raises(ValueError, match="has no column"):
        loader(write(rows), columns={"question": "prompt"})


def test_hub_ids_are_read_over_the_network(tokenizer, monkeypatch):
    asked = []

    def load(identifier, config, streaming=False):
        asked.append((identifier, config, streaming))
        rows = datasets.Dataset.from_list(ROWS[SFTDataModule])
        return {"train": rows.to_iterable_dataset(), "test": rows.to_iterable_dataset()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = {"train": "owner/name@part", "validation": "owner/name:test", "stream": StreamOptions(eval_rows=6)}
    data = SFTDataModule(tokenizer=tokenizer, **options)
    data.prepare_data()
    data.setup("fit")
    assert set(asked) == {("owner/name", "part", True), ("owner/name", None, True)}  # nothing is downloaded
    assert next(iter(data.train_dataloader()))["labels"].shape[0] == 8
    assert data.reports["validation"]["rows"] == 6


def test_what_goes_to_workers_can_be_sent(loader, write):
    """As where processes do not begin as a fork."""
    batches = loader(write(ROWS[SFTDataModule]))._loader().dataset
    first, again = next(iter(batches)), next(iter(pickle.loads(pickle.dumps(batches))))
    same(first.batch, again.batch)


@pytest.mark.slow
def test_a_program_ends_while_workers_wait(write, tmp_path):
    code = f"""
import sys
from datamodules import SFTDataModule, StreamOptions
from tests.datamodules.conftest import build_tokenizer
data = SFTDataModule(train={write(ROWS[SFTDataModule])!r}, tokenizer=build_tokenizer(), num_workers=1,
                     stream=StreamOptions())
data.setup("fit")
batches = iter(data.train_dataloader())
next(batches)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
