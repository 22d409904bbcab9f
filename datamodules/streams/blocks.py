"""A block of a shard's rows as a small table, and the rows that a shard hands out, block after block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.batching import IGNORE, Table
from datamodules.reading import SplitReader
from datamodules.rows.rows import RenamedRows, Rows
from datamodules.streams.sources import StreamSource
from datamodules.streams.tapes import Deal, Found, Row

if TYPE_CHECKING:
    from datamodules.base import AlignmentDataModule

Report = dict[str, Any]


class BlockRows:
    """Some rows of a stream.

    Args:
        found: The rows, with their places.
        source: Describes a place.
    """

    def __init__(self, found: Sequence[Found], source: StreamSource) -> None:
        self.found, self.source, self.name = found, source, source.name

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> Row:
        return self.found[index].row

    def __iter__(self) -> Iterator[Row]:
        return self.between(0, len(self))

    def between(self, start: int, stop: int) -> Iterator[Row]:
        """The rows from `start` up to, and without, `stop`."""
        return (found.row for found in self.found[start:stop])

    def where(self, index: int) -> str:
        """Describe the place of row `index`."""
        return self.source.where(self.found[index].mark)

    def identity(self) -> Any:
        """None: a stream is read, and not kept."""
        return None


@dataclass(frozen=True)
class BlockMaker:
    """Makes tables of blocks of rows, all in the way that the first rows of the stream have settled.

    Attributes:
        source: The rows.
        data: The data module, whose options and `build` count.
        kind: The rows' format.
        seen: What `formats.summary` says of the first rows.
        labelled: Whether the first rows have a `label` (see `SplitReader`).
        first: The first row, which has all columns that are renamed.
        keys: Keys of the table's rows, as the first rows have them.
        buffer_size: Rows of a block.
    """

    source: StreamSource
    data: AlignmentDataModule
    kind: str
    seen: dict[str, Any]
    labelled: bool
    first: Row
    keys: tuple[str, ...]
    buffer_size: int

    def make(self, found: Sequence[Found]) -> tuple[Table, Callable[[list[Any]], Any], SplitReader]:
        """The table of some rows, what makes batches of its rows, and the reader, which kept count.

        Raises:
            ValueError: A row cannot be used; the message names its place.
        """
        rows: Rows = BlockRows(found, self.source)
        if self.data.columns:
            rows = RenamedRows(rows, self.data.columns, first=self.first)
        reader = self.data.splits.reader("train", rows, self.kind, self.seen, self.data.overflow)
        reader.bar, reader.may_be_empty, reader.labelled = False, True, self.labelled
        table, collate = self.data.build(reader)
        return table, collate, reader


class ShardRows:
    """Hands out the table rows of one shard of a stream, for ever: when the source ends, a new pass begins.

    A block holds the shard's next `buffer_size` rows of the source, of one pass. What is handed out depends on the
    source, the options and the shard alone, and `position` says in plain values where it stands.

    Args:
        maker: Makes the blocks.
        deal: The shard.
        position: Where to begin: what `position()` returned.
        word: How messages call the shard.
    """

    def __init__(self, maker: BlockMaker, deal: Deal, position: Mapping[str, Any] | None, word: str = "") -> None:
        at = position or {}
        self.maker, self.deal, self.word = maker, deal, word
        self.turn, self.block, self.kept = (int(at.get(name, 0)) for name in ("turn", "block", "kept"))
        self.report: Report = dict(at.get("report", {"passes": 0}))
        self.collate: Callable[[list[Any]], Any] = list
        self._before = self._state(at.get("source"))
        self._table = Table()
        self._order, self._given = np.zeros(0, np.int64), 0
        if at.get("fingerprint") is None:
            self._tape = maker.source.open(deal, self.turn, at.get("source"))
        else:
            self._take_up(at)

    def take(self, count: int) -> list[dict[str, Any]]:
        """The next rows of the tables.

        Raises:
            ValueError: A row of the source cannot be used, or a whole pass has none that can.
        """
        rows: list[dict[str, Any]] = []
        while len(rows) < count:
            self._need_rows()
            row = self._table.row(int(self._order[self._given]))
            rows.append(self._numbered(row))
            self._given += 1
        return even(rows, self.maker.keys)

    def skip(self, count: int) -> None:
        """Passes over the next rows."""
        while count:
            self._need_rows()
            step = min(count, len(self._order) - self._given)
            self._given, count = self._given + step, count - step

    def position(self) -> dict[str, Any]:
        """Pass, block, rows of it handed out, and where in the source it begins; with the counts of what came before.

        A block of which all was handed out stands here, too: read again, it shows whether the source is still the same.
        """
        return {**self._before, "given": self._given}

    def _state(self, source: Any) -> dict[str, Any]:
        counts = {"turn": self.turn, "block": self.block, "kept": self.kept, "report": dict(self.report)}
        return {**counts, "source": source, "fingerprint": None}

    def _need_rows(self) -> None:
        while self._given == len(self._order):
            before = self._state(self._tape.position())
            found = self._tape.read(self.maker.buffer_size)
            if len(found) < self.maker.buffer_size:
                self._check_rows_for_all()
            if found:
                self._fill(found, before)
            else:
                self._turn_over()

    def _check_rows_for_all(self) -> None:
        """At the end of the source: all ranks say so where it has too few rows, and none waits for another."""
        rows, shards = self._tape.number, self.deal.shards
        if self._tape.whole and rows < shards:
            raise ValueError(
                f"train: {self.maker.source.name} has {rows} rows for {shards} shards (workers of all ranks), and each "
                "needs one: use fewer workers or ranks, or leave stream out"
            )

    def _fill(self, found: list[Found], before: dict[str, Any]) -> None:
        self._table, self.collate, reader = self.maker.make(found)
        self._found, self._places = found, reader.places
        order = np.random.default_rng([self.maker.data.seed, self.turn, self.block, self.deal.shard])
        size = len(self._table)
        self._order, self._given = order.permutation(size) if self.maker.data.shuffle else np.arange(size), 0
        self.block, self.kept = self.block + 1, self.kept + size
        self._before = before | {"fingerprint": self._table.fingerprint}
        add_report(self.report, reader.report)

    def _turn_over(self) -> None:
        if not self.kept:
            read = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.report.items())
            raise ValueError(
                f"train: a whole pass over {self.maker.source.name} left no row to use to {self.word}"
                + (f" ({read})" if read else "")
                + "; each worker of each rank needs rows of its own: use fewer workers, rows that can be used, or "
                "leave stream out"
            )
        self.turn, self.block, self.kept = self.turn + 1, 0, 0
        self.report["passes"] = self.turn
        self._tape = self.maker.source.open(self.deal, self.turn)

    def _take_up(self, at: Mapping[str, Any]) -> None:
        """Reads the block again in which a position stands."""
        exact = {**at["source"], "number": at["source"].get("number", 0)}
        counted = {name: value for name, value in exact.items() if name != "state"}
        turn, block, kept, report = self.turn, self.block, self.kept, dict(self.report)
        for source in (exact, counted) if "state" in exact else (exact,):
            # a state that leaves a buffer of the iterable's own out is none: then rows are counted from the first on
            self.turn, self.block, self.kept, self.report = turn, block, kept, dict(report)
            self._tape = self.maker.source.open(self.deal, self.turn, source)
            found = self._tape.read(self.maker.buffer_size)
            if found:
                self._fill(found, self._state(at["source"]))
            if found and self._table.fingerprint == at["fingerprint"]:
                self._given = int(at["given"])
                return
        place = self.maker.source.where(found[0].mark) if found else f"the end of {self.maker.source.name}"
        raise ValueError(
            f"train: cannot resume: the rows from {place} on are not those of the checkpoint; the source has changed "
            "since, or gives other rows each time. Resume with the rows of then, or start a new run from the exported "
            "weights"
        )

    def _numbered(self, row: dict[str, Any]) -> dict[str, Any]:
        """Makes `index`, which counts within the block, one of the stream."""
        if "index" in row:
            number, place = divmod(row["index"], self._places)
            row["index"] = self._found[number].number * self._places + place
        return row


def add_report(total: Report, report: Report) -> None:
    """Adds the counts of one report to another; of `longest` and `passes` the larger is kept."""
    for name, value in report.items():
        if name in ("longest", "passes"):
            total[name] = max(total.get(name, 0), value)
        elif isinstance(value, int) and not isinstance(value, bool):
            total[name] = total.get(name, 0) + value
        else:
            total[name] = value


def even(rows: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Gives rows of several blocks the same keys, in one order.

    Args:
        rows: Rows of tables.
        keys: Keys that all rows are to have.

    Raises:
        ValueError: A row lacks a number of its own that others have.
    """
    names = dict.fromkeys((*keys, *(name for row in rows for name in row)))
    if all(row.keys() == names.keys() for row in rows):
        return rows
    return [{name: row[name] if name in row else _missing(row, name) for name in names} for row in rows]


def _missing(row: Mapping[str, Any], name: str) -> Any:
    """What a key stands for where a block did without it."""
    if name == "loss_weights":
        return (row["labels"] != IGNORE).astype(np.float32)
    if name.endswith("_loss_mask"):
        return np.ones(len(row[name.removesuffix("_loss_mask")]), dtype=bool)
    if "prompts" in row:
        return None
    raise ValueError(
        f"train: row {row.get('index')} of the stream has no {name}, and the first rows or its neighbours have; give "
        f"all rows a {name}, or none"
    )
