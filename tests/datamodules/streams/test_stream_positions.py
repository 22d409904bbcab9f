"""Streams that are resumed: exactly the rest, from every kind of source, or a refusal that says what changed."""

import itertools
import json

import datasets
import pytest

from datamodules import SFTDataModule
from tests.datamodules.streams.streamed import ROWS, Numbers


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


def texts(batches):
    """A batch's rows as plain values."""
    return [[tuple(row) for row in batch["input_ids"].tolist()] for batch in batches]


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
