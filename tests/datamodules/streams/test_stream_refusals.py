"""Streams of rows, sources and options that cannot be used: refused, with the row or the option by name."""

import itertools

import pytest
from torch.utils.data import get_worker_info

from datamodules import SFTDataModule, StreamOptions
from datamodules.curricula import ByLength
from tests.datamodules.streams.streamed import ROWS, Numbers


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


def test_ranks_that_read_other_rows_are_refused(loader, write, monkeypatch):
    monkeypatch.setattr("datamodules.streams.stream._Ranks.gather", lambda self, value: [value, "another"])
    with pytest.raises(ValueError, match="gives other rows on each rank"):
        loader(write(ROWS[SFTDataModule]), ranks=2)
