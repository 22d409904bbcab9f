"""Streams of training rows: the batches of the table path, dealt without repeats, resumed exactly, counted."""

import itertools
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from datamodules import (
    PreferenceDataModule,
    PretrainDataModule,
    PromptDataModule,
    SFTDataModule,
    StreamOptions,
    UnpairedDataModule,
)
from datamodules.curricula import ByLength

ROOT = Path(__file__).parents[3]
ROWS = {
    PretrainDataModule: [{"text": "0123456789"[: 2 + n % 8] + str(n)} for n in range(37)],
    SFTDataModule: [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(37)],
    PreferenceDataModule: [{"prompt": f"{n}=", "chosen": str(n), "rejected": f"{n}{n}"} for n in range(37)],
    UnpairedDataModule: [{"prompt": f"{n}=", "completion": str(n), "label": n % 3 > 0} for n in range(37)],
    PromptDataModule: [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(37)],
}


class Numbers(IterableDataset):
    """Rows of numbers, for each pass from the first on."""

    def __init__(self, rows=37, fails_at=None):
        self.rows, self.fails_at = rows, fails_at

    def __iter__(self):
        for number in range(self.rows):
            if number == self.fails_at:
                raise OSError("the disk is gone")
            yield {"prompt": f"{number}+1=", "completion": str(number + 1)}


class Stateful(Numbers):
    """Goes on where it stopped, as data sets with a state do."""

    def __init__(self, rows=37):
        super().__init__(rows)
        self.at = 0

    def __iter__(self):
        while self.at < self.rows:
            self.at += 1
            yield {"prompt": f"{self.at - 1}+1=", "completion": str(self.at)}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.fixture
def write(tmp_path):
    def to_file(rows, name="rows.jsonl"):
        path = tmp_path / name
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path, batch_size=10)
        else:
            path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
        return str(path)

    return to_file


@pytest.fixture
def loader(tokenizer):
    def make(train, module=SFTDataModule, rank=0, ranks=1, buffer_size=10, **options):
        options = {"batch_size": 4, "max_length": 24, "shuffle": False, **options}
        data = module(train=train, tokenizer=tokenizer, stream=StreamOptions(buffer_size=buffer_size), **options)
        data.setup("fit")
        return data._stream.loader(ranks, rank)

    return make


def texts(batches):
    """A batch's rows as plain values."""
    return [[tuple(row) for row in batch["input_ids"].tolist()] for batch in batches]


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


SOURCES = {
    "jsonl": lambda write: write(ROWS[SFTDataModule]),
    "parquet": lambda write: write(ROWS[SFTDataModule], "rows.parquet"),
    "torch": lambda write: Numbers(),
    "torch with a state": lambda write: Stateful(),
    "datasets": lambda write: datasets.Dataset.from_list(ROWS[SFTDataModule]).to_iterable_dataset(),
    "parts": lambda write: datasets.Dataset.from_list(ROWS[SFTDataModule]).to_iterable_dataset(num_shards=4),
    "shuffled": lambda write: (
        datasets.Dataset.from_list(ROWS[SFTDataModule]).to_iterable_dataset().shuffle(seed=3, buffer_size=7)
    ),
    "mapped": lambda write: (
        datasets.Dataset.from_list(ROWS[SFTDataModule]).to_iterable_dataset().map(lambda row: {"more": row["prompt"]})
    ),
}


@pytest.mark.parametrize(
    ("kind", "packing"), [*((kind, False) for kind in SOURCES), ("jsonl", True), ("shuffled", True)]
)
def test_a_resumed_loader_gives_exactly_the_rest(kind, packing, loader, write):
    def make():
        return loader(SOURCES[kind](write), packing=packing, shuffle=True)

    whole = texts(itertools.islice(make(), 22))
    for at in (0, 5, 14):
        killed = make()
        seen = texts(itertools.islice(killed, at))
        state = json.loads(json.dumps(killed.state_dict()))
        resumed = make()
        resumed.load_state_dict(state)
        assert seen + texts(itertools.islice(resumed, 22 - at)) == whole


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_resume_exactly_also_from_a_batch_before_the_last(workers, ahead, loader, write):
    path = write(ROWS[SFTDataModule])

    def make(num_workers):
        made = loader(path, num_workers=num_workers, shuffle=True)
        made.margin = lambda: 3
        return made

    whole = texts(itertools.islice(make(2), 16))
    killed = make(2)
    iterator = iter(killed)
    for _ in range(9 + ahead):
        next(iterator)
    killed.done = lambda: 9  # the rest was fetched, and is not done
    state = killed.state_dict()
    del iterator, killed
    resumed = make(workers)
    resumed.load_state_dict(state)
    assert texts(itertools.islice(resumed, 7)) == whole[9:]
    with pytest.raises(ValueError, match=r"num_workers=3 cannot share what 2 workers .* one of 0, 1, 2"):
        make(3).load_state_dict(state)


def test_every_rank_takes_its_own_position_up(loader, write):
    path, states = write(ROWS[SFTDataModule]), []
    killed = [loader(path, rank=rank, ranks=2, shuffle=True, num_workers=rank * 0) for rank in range(2)]
    whole = [texts(itertools.islice(loader(path, rank=rank, ranks=2, shuffle=True), 12)) for rank in range(2)]
    for made in killed:
        assert len(list(itertools.islice(made, 7))) == 7
        made.gather = lambda value: states.append(value)  # as where the others cannot be asked
        alone = made.state_dict()
    for rank in range(2):
        resumed = loader(path, rank=rank, ranks=2, shuffle=True)
        killed[0].gather = lambda value: states
        resumed.load_state_dict(killed[0].state_dict())
        assert texts(itertools.islice(resumed, 5)) == whole[rank][7:]
        resumed.load_state_dict(alone)  # from the beginning on
        assert texts(itertools.islice(resumed, 5)) == whole[rank][7:]


def test_a_second_iterator_goes_on(loader, write):
    made = loader(write(ROWS[SFTDataModule]))
    whole = texts(itertools.islice(loader(made.maker.source.name), 8))
    first = texts(itertools.islice(made, 3))
    assert first + texts(itertools.islice(made, 5)) == whole
    made.done = lambda: 2  # as where a batch was fetched at the end of an epoch
    assert texts(itertools.islice(made, 6)) == whole[2:]


def test_settings_and_sources_that_changed_are_refused(loader, write):
    rows = ROWS[SFTDataModule]
    path = write(rows)
    made = loader(path)
    list(itertools.islice(made, 4))
    state = made.state_dict()
    for options, named in (({"seed": 1}, "seed"), ({"buffer_size": 9}, "stream.buffer_size"), ({"ranks": 2}, "world")):
        with pytest.raises(ValueError, match=f"cannot resume the training data: {named}"):
            loader(path, **options).load_state_dict(state)
    write([{**row, "completion": "7"} for row in rows])
    with pytest.raises(ValueError, match="cannot resume the training data: first_rows"):
        loader(path).load_state_dict(state)
    write(rows[:2])
    changed = loader(path)
    changed.settings["first_rows"] = state["first_rows"]
    changed.load_state_dict(state)
    with pytest.raises(ValueError, match=r"rows.jsonl has .* bytes, and was read up to byte"):
        next(iter(changed))


def test_a_change_after_the_first_rows_is_told(loader, write):
    rows = [{"prompt": f"{n}=", "completion": str(n)} for n in range(150)]
    path = write(rows)
    made = loader(path, batch_size=30, buffer_size=60)
    list(itertools.islice(made, 3))
    state = made.state_dict()
    rows[118]["completion"] = "5"
    write(rows)
    resumed = loader(path, batch_size=30, buffer_size=60)
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match=r"rows from .*rows.jsonl:121 on are not those of the checkpoint"):
        next(iter(resumed))


def test_a_state_of_the_other_kind_is_refused(loader, write, tokenizer):
    path = write(ROWS[SFTDataModule])
    table = SFTDataModule(train=path, tokenizer=tokenizer).train_dataloader()
    with pytest.raises(ValueError, match="training rows were no stream"):
        loader(path).load_state_dict(table.state_dict())
    with pytest.raises(ValueError, match="read its training rows as a stream"):
        table.load_state_dict(loader(path).state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_cannot_be_used_is_named(workers, loader, write):
    rows = [*ROWS[SFTDataModule], *({"prompt": "1=", "completion": "1"} for _ in range(80)), {"prompt": "1="}]
    with pytest.raises(ValueError, match=r"^train: .*rows.jsonl:235: needs column completion"):
        list(itertools.islice(loader(write(rows), num_workers=workers), 100))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_raises_is_named_with_the_row(workers, loader):
    made = loader(Numbers(200, fails_at=120), num_workers=workers)
    with pytest.raises(ValueError, match=r"row 120 of the Numbers given as train could not be read: OSError: the disk"):
        list(itertools.islice(made, 100))
    with pytest.raises(ValueError, match=r"^train: row 3 of the Numbers given as train could not be read"):
        loader(Numbers(fails_at=3))


def test_a_line_cut_short_is_named(loader, write):
    path = write([*ROWS[SFTDataModule]] * 4)
    with open(path, "a") as file:
        file.write('{"prompt": "1=", "comp')
    with pytest.raises(ValueError, match=r"rows.jsonl:297: not valid JSON"):
        list(itertools.islice(loader(path), 100))


@pytest.mark.parametrize("rows", [0, 3])
def test_fewer_rows_than_shards(rows, loader, write):
    path = write(ROWS[SFTDataModule][:rows])
    for rank in range(2):  # each rank says so, and none waits for the other
        with pytest.raises(ValueError, match="has no rows" if not rows else "has 3 rows for 4 shards"):
            next(iter(loader(path, rank=rank, ranks=2, num_workers=2)))


def test_a_shard_of_which_nothing_can_be_used(loader, write):
    rows = [{"prompt": "1=", "completion": "1" if n % 2 else "1" * 50} for n in range(20)]
    options = {"overflow": "drop", "ranks": 2}
    assert next(iter(loader(write(rows), rank=1, **options)))["input_ids"].shape == (4, 4)
    with pytest.raises(ValueError, match=r"a whole pass .* left no row to use to rank 0 .*dropped too long 10"):
        next(iter(loader(write(rows), rank=0, **options)))


class Self(Numbers):
    """Deals its rows to workers itself."""

    def __iter__(self):
        info = get_worker_info()
        return itertools.islice(super().__iter__(), info.id if info else 0, None, info.num_workers if info else 1)


class Once(Numbers):
    """Has one iterator."""

    def __init__(self):
        super().__init__()
        self.iterator = super().__iter__()

    def __iter__(self):
        return self.iterator


def test_sources_that_are_no_streams_of_rows(loader, write):
    with pytest.raises(ValueError, match=r"gives other rows in a worker .*set num_workers=0"):
        list(itertools.islice(loader(Self(), num_workers=2), 10))
    assert len(list(itertools.islice(loader(Self()), 10))) == 10
    with pytest.raises(ValueError, match="gives one iterator for ever"):
        loader(Once())
    with pytest.raises(ValueError, match="it has a length and is in memory already; leave stream out"):
        loader(ROWS[SFTDataModule])
    with pytest.raises(ValueError, match=r"kind '.json' cannot be read as a stream"):
        loader(write([], "rows.json"))


def test_options_that_contradict_a_stream(tokenizer, write):
    path = write(ROWS[SFTDataModule])
    for options, words in (
        ({"validation": 0.1}, "validation=0.1 is a share of the training rows, and a stream"),
        ({"drop_last": True}, "drop_last=True has no effect on a stream"),
        ({"max_tokens": 100}, "max_tokens=100 chooses among all rows, and a stream knows those of a block alone"),
        ({"curriculum": ByLength()}, r"curriculum=.* chooses among all rows"),
        ({"stream": 3}, "stream=3 must be StreamOptions"),
        ({"validation": path, "stream": StreamOptions(eval_rows=3)}, "stream.eval_rows=3 bounds"),
    ):
        with pytest.raises(ValueError, match=words):
            SFTDataModule(train=path, tokenizer=tokenizer, **{"stream": StreamOptions(), **options})


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


def test_ranks_that_read_other_rows_are_refused(loader, write, monkeypatch):
    monkeypatch.setattr("datamodules.streams.stream._Ranks.gather", lambda self, value: [value, "another"])
    with pytest.raises(ValueError, match="gives other rows on each rank"):
        loader(write(ROWS[SFTDataModule]), ranks=2)


def test_what_goes_to_workers_can_be_sent(loader, write):
    """As where processes do not begin as a fork."""
    batches = loader(write(ROWS[SFTDataModule]))._loader().dataset
    first, again = next(iter(batches)), next(iter(pickle.loads(pickle.dumps(batches))))
    same(first.batch, again.batch)


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
