"""A loader over a stream that resumes exactly, with any number of workers, under data parallelism."""

from __future__ import annotations

import atexit
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.streams.blocks import BlockMaker, Report, ShardRows, add_report
from datamodules.streams.tapes import Deal
from datamodules.workers import start_worker


class Given(NamedTuple):
    """What a worker hands over: a batch, or why there is none.

    Attributes:
        batch: The batch; None: the worker failed.
        shard: Which shard of the rank gave its rows.
        position: Where that shard stands after them.
        report: What it has read so far.
        error: What is wrong with the data.
    """

    batch: Any
    shard: int
    position: dict[str, Any]
    report: Report
    error: str | None = None


class Bookmark(NamedTuple):
    """Where a shard stood before some batch.

    Attributes:
        batches: Batches of its rank before that one, those of other shards among them.
        position: What its `position()` said; None: its beginning.
    """

    batches: int
    position: dict[str, Any] | None


class StreamBatches(IterableDataset[Given]):
    """Batches of a rank; a worker process gives each of its turns, in order.

    Batch t holds rows of shard `t % shards` of the rank, so the batches are the same with any number of workers that
    divides that of the shards.

    Args:
        maker: Makes blocks of rows.
        batch_size: Rows of a batch.
        rank: This rank.
        replicas: Number of ranks.
        bookmarks: Of each shard of the rank, a place at or before the first batch to give.
        first: Number of the first batch to give.
    """

    def __init__(
        self,
        maker: BlockMaker,
        *,
        batch_size: int,
        rank: int,
        replicas: int,
        bookmarks: Sequence[Bookmark],
        first: int,
    ) -> None:
        self.maker, self.batch_size, self.rank, self.replicas = maker, batch_size, rank, replicas
        self.bookmarks, self.first = list(bookmarks), first

    def __iter__(self) -> Iterator[Given]:
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        shards: dict[int, ShardRows] = {}
        number = self.first + start
        while True:
            shard = number % len(self.bookmarks)
            try:
                if shard not in shards:
                    shards[shard] = self._open(shard)
                rows = shards[shard]
                taken = rows.take(self.batch_size)
                batch = rows.collate(taken)
            except ValueError as error:
                yield Given(None, shard, {}, {}, str(error))
                return
            yield Given(batch, shard, rows.position(), dict(rows.report))
            number += step

    def _open(self, shard: int) -> ShardRows:
        count, mark = len(self.bookmarks), self.bookmarks[shard]
        deal = Deal(shard * self.replicas + self.rank, count * self.replicas)  # a rank's rows with any number of shards
        word = f"rank {self.rank}" + (f", worker {shard}" if count > 1 else "")
        rows = ShardRows(self.maker, deal, mark.position, word)
        passed = sum(number % count == shard for number in range(mark.batches, self.first))
        rows.skip(self.batch_size * passed)
        return rows


def _end_workers(loader: weakref.ref[StreamLoader]) -> None:
    """Ends the workers of a loader that is not exhausted, as none ever is, when the interpreter does.

    They leave the signal alone by which `multiprocessing` would end them.
    """
    if (found := loader()) is not None:
        found.close()


class StreamLoader:
    """Endless batches of one rank of a stream, which begin where the run stands.

    Each rank and worker reads rows of its own, a shard. The state holds the positions of all ranks' shards at some
    batch before the one that comes next; a resumed loader reads on from there. The global random generators are left
    alone, and processes start at the first `next`.

    Args:
        maker: Makes blocks of rows.
        batch_size: Rows of a batch.
        rank: This rank.
        replicas: Number of ranks.
        num_workers: Worker processes; they make as many shards of the rank's rows.
        settings: What must be equal where a state is taken up, in plain values.
        gather: Makes of a value of each rank the list of all, in order of ranks; None: they cannot be asked now.

    Attributes:
        done: Says how many batches the run has done with since its beginning; None: all that were handed out.
        margin: Says how many batches before the last one handed out a run may be taken up again.
        heard: Called with what this rank has read so far, whenever a shard has read another block.
    """

    def __init__(
        self,
        maker: BlockMaker,
        *,
        batch_size: int,
        rank: int = 0,
        replicas: int = 1,
        num_workers: int = 0,
        settings: Mapping[str, Any] | None = None,
        gather: Callable[[Any], list[Any] | None] = lambda value: [value],
    ) -> None:
        self.maker, self.batch_size, self.rank, self.replicas = maker, batch_size, rank, replicas
        self.num_workers, self.settings, self.gather = num_workers, dict(settings or {}), gather
        self.done: Callable[[], int] | None = None
        self.margin: Callable[[], int] = lambda: 0
        self.heard: Callable[[Report], None] = lambda report: None
        self._start = [Bookmark(0, None)] * max(1, num_workers)
        self._known = [self._start] * replicas  # of all ranks
        self._begin(self._start, 0)

    def _begin(self, bookmarks: Sequence[Bookmark], handed: int) -> None:
        self._bookmarks, self._handed = list(bookmarks), handed
        self._recent: deque[tuple[int, Bookmark]] = deque()  # shard and its new place, batch by batch
        # Lightning ends the workers of an iterator of this name when a fit is over
        self._iterator: Iterator[Given] | None = None
        self._reports: dict[int, Report] = {}

    def close(self) -> None:
        """Ends the workers; a later iterator goes on all the same."""
        self._iterator = None

    def __iter__(self) -> Iterator[Any]:
        first = self._handed if self.done is None else self.done()
        if self._iterator is None or first != self._handed:
            behind = all(mark.batches <= first for mark in self._bookmarks)
            self._begin(self._bookmarks if behind else self._start, first)
        return self._hand_out()

    def _hand_out(self) -> Iterator[Any]:
        while True:
            if self._iterator is None:
                self._iterator = iter(self._loader())
                if self.num_workers:
                    atexit.register(_end_workers, weakref.ref(self))
            given = next(self._iterator)
            if given.error is not None:
                self._iterator = None
                raise ValueError(given.error)
            self._note(given)
            yield given.batch

    def _loader(self) -> DataLoader[Given]:
        batches = StreamBatches(
            self.maker,
            batch_size=self.batch_size,
            rank=self.rank,
            replicas=self.replicas,
            bookmarks=self._bookmarks,
            first=self._handed,
        )
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            worker_init_fn=start_worker,
        )

    def _note(self, given: Given) -> None:
        self._handed += 1
        self._recent.append((given.shard, Bookmark(self._handed, given.position)))
        while len(self._recent) > self.margin():
            shard, mark = self._recent.popleft()
            self._bookmarks[shard] = mark
        if given.report != self._reports.get(given.shard):
            self._reports[given.shard] = given.report
            total: Report = {}
            for report in self._reports.values():
                add_report(total, report)
            self.heard(total)

    def state_dict(self) -> dict[str, Any]:
        """Position and settings, plain numbers and strings, equal on all ranks, all of which must call this.

        Returns:
            `batches_seen`, the batches done, and for each shard of each rank a place at or before the one that comes
            next. Where the other ranks cannot be asked, it is the last that is known: a resumed run then reads more
            rows again.
        """
        known = self.gather(self._bookmarks)
        if known is not None:
            self._known = [[Bookmark(*mark) for mark in marks] for marks in known]
        seen = self._handed if self.done is None else self.done()
        positions = [[mark._asdict() for mark in marks] for marks in self._known]
        return {"epoch": 0, "batches_seen": seen, "positions": positions, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, with the same shards, read by as many workers or by fewer.

        Raises:
            ValueError: A setting differs from the one the state was saved with, or the workers cannot share its shards.
        """
        if not state:
            return
        if "positions" not in state:
            raise ValueError(
                "cannot resume the training data: the checkpoint is of a run whose training rows were no stream. "
                "Resume without stream, or start a new run from the exported weights"
            )
        for name, value in self._settings().items():
            if state.get(name, value) != value:
                raise ValueError(
                    f"cannot resume the training data: {name} was {state[name]!r} when the checkpoint was saved and is "
                    f"{value!r} now. Resume with the same source, options and number of processes, or start a new run "
                    "from the exported weights"
                )
        known = [[Bookmark(**mark) for mark in marks] for marks in state["positions"]]
        shards = len(known[self.rank])
        if shards % max(1, self.num_workers):
            fits = [0, *(count for count in range(1, shards + 1) if shards % count == 0)]
            raise ValueError(
                f"cannot resume the training data: num_workers={self.num_workers} cannot share what {shards} workers "
                f"of each rank read when the checkpoint was saved; set num_workers to one of "
                f"{', '.join(map(str, fits))}, or start a new run from the exported weights"
            )
        self._known, self._start = known, known[self.rank]
        self._begin(self._start, int(state["batches_seen"]))

    def _settings(self) -> dict[str, Any]:
        return {"world_size": self.replicas, "batch_size": self.batch_size, **self.settings}
