"""Reads the rows of one shard of a stream in order, from any position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from datamodules.tables import RowChecksum

Row = dict[str, Any]
_END = object()


class Deal(NamedTuple):
    """Which rows a shard takes: those numbers that leave `shard` when divided by `shards`.

    >>> [number for number in range(7) if Deal(1, 3).takes(number)]
    [1, 4]
    """

    shard: int = 0
    shards: int = 1

    def takes(self, number: int) -> bool:
        """Whether row `number` of the stream is this shard's."""
        return number % self.shards == self.shard


class Found(NamedTuple):
    """A row with its place.

    Attributes:
        number: Its number in the stream.
        mark: Its place, as the source's `where` reads it.
        row: Its columns.
    """

    number: int
    mark: tuple[int, int]
    row: Row


def checksum_of(row: Mapping[str, Any]) -> int:
    """A checksum of a row's values; of objects that are no data only the type counts; 0 for nesting without bound."""
    checksum = RowChecksum()
    try:
        checksum.add(row)
    except RecursionError:  # told when the column is read, if it is
        return 0
    return checksum.value


class Tape(Protocol):
    """One pass over the rows of one shard.

    Attributes:
        number: Rows that were passed so far, those of other shards among them where it reads the `whole` stream.
        whole: Whether it does, instead of a part of the stream that holds this shard's rows alone.
    """

    number: int
    whole: bool

    def read(self, count: int) -> list[Found]:
        """The next rows of the shard, fewer than `count` where the stream ends."""
        ...

    def position(self) -> dict[str, Any]:
        """Where the next read begins, in plain values."""
        ...


class LinesTape:
    """Rows of files that hold one in a line, blank lines left out; lines of other shards are not parsed.

    Args:
        paths: The files, in order.
        parse: Makes a row of a line, given its path and its number, from 1.
        deal: Which rows are read.
        position: Where to begin: what `position()` returned.

    Raises:
        ValueError: A file is shorter than it was, or a line is no row.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        parse: Callable[[Path, bytes, int], Row],
        deal: Deal,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        at, self.whole = position or {}, True
        self.paths, self.parse, self.deal = paths, parse, deal
        self.file, self.offset, self.line = (int(at.get(name, 0)) for name in ("file", "offset", "line"))
        self.number = int(at.get("number", 0))
        self._rows = self._walk()

    def read(self, count: int) -> list[Found]:
        """The next rows of the shard."""
        return list(islice(self._rows, count))

    def position(self) -> dict[str, Any]:
        """File, byte and line of the next row, and its number."""
        return {"file": self.file, "offset": self.offset, "line": self.line, "number": self.number}

    def _walk(self) -> Iterator[Found]:
        while self.file < len(self.paths):
            path = self.paths[self.file]
            with path.open("rb") as file:
                _check_size(path, self.offset)
                file.seek(self.offset)
                for raw in file:
                    self.offset += len(raw)
                    self.line += 1
                    if raw.isspace():
                        continue
                    number, self.number = self.number, self.number + 1
                    if self.deal.takes(number):
                        yield Found(number, (self.file, self.line), self.parse(path, raw, self.line))
            self.file, self.offset, self.line = self.file + 1, 0, 0


def _check_size(path: Path, offset: int) -> None:
    if path.stat().st_size < offset:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, and was read up to byte {offset} when the checkpoint was saved: "
            "it has changed since; resume with the file of then"
        )


class ParquetTape:
    """Rows of Parquet files, one row group after the other; rows of other shards are not made into Python objects.

    Args:
        paths: The files, in order.
        deal: Which rows are read.
        position: Where to begin: what `position()` returned.
    """

    def __init__(self, paths: Sequence[Path], deal: Deal, position: Mapping[str, Any] | None = None) -> None:
        at, self.whole = position or {}, True
        self.paths, self.deal = paths, deal
        self.file, self.group, self.row = (int(at.get(name, 0)) for name in ("file", "group", "row"))
        self.number = int(at.get("number", 0))
        self._rows = self._walk()

    def read(self, count: int) -> list[Found]:
        """The next rows of the shard."""
        return list(islice(self._rows, count))

    def position(self) -> dict[str, Any]:
        """File, row group and row of the group of the next row, and its number."""
        return {"file": self.file, "group": self.group, "row": self.row, "number": self.number}

    def _walk(self) -> Iterator[Found]:
        while self.file < len(self.paths):
            file = open_parquet(self.paths[self.file])
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            while self.group < len(sizes):
                start = self.number - self.row
                yield from self._walk_group(file, start, sum(sizes[: self.group]))
                self.group, self.row, self.number = self.group + 1, 0, start + sizes[self.group]
            self.file, self.group = self.file + 1, 0

    def _walk_group(self, file: Any, start: int, before: int) -> Iterator[Found]:
        """The rest of a row group.

        Args:
            file: The open file.
            start: Number of the group's first row in the stream.
            before: Rows of the file before the group.
        """
        first = 0
        for batch in file.iter_batches(batch_size=1024, row_groups=[self.group]):
            rows = range(max(first, self.row), first + len(batch))
            own = [row for row in rows if self.deal.takes(start + row)]
            taken = batch.take([row - first for row in own]).to_pylist() if own else []
            for row, values in zip(own, taken, strict=True):
                self.row, self.number = row + 1, start + row + 1
                yield Found(start + row, (self.file, before + row), values)
            first += len(batch)


def open_parquet(path: Path) -> Any:
    """An open Parquet file.

    Raises:
        ValueError: It is none.
    """
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{str(path)!r} is not a readable Parquet file: {error}") from error


class IterableTape:
    """Rows of an iterable.

    Args:
        rows: The iterator of this pass, at its first row or at that of a state.
        state: Tells the iterator's state after the last row it gave; None: it has none.
        deal: Which rows are read.
        whole: Whether the iterator gives the rows of all shards; else it gives those of this shard alone, and its row n
            has the number `n * shards + shard`.
        number: Rows that the iterator gave before.
        place: Describes the place of a row, by its number in the iterator, for errors.
        expected: Checksums of the first rows, as they were before.
    """

    def __init__(
        self,
        rows: Iterator[Any],
        state: Callable[[], Any] | None,
        deal: Deal,
        *,
        whole: bool,
        number: int,
        place: Callable[[int], str],
        expected: Sequence[int] = (),
    ) -> None:
        self.state, self.deal, self.whole, self.number, self.place = state, deal, whole, number, place
        self._source, self._expected = rows, expected
        self._rows = self._walk()

    def read(self, count: int) -> list[Found]:
        """The next rows of the shard."""
        return list(islice(self._rows, count))

    def position(self) -> dict[str, Any]:
        """How many rows the iterable gave, and its own state where it has one."""
        return {"number": self.number} | ({} if self.state is None else {"state": self.state()})

    def skip(self, count: int) -> None:
        """Reads on until `count` rows were given."""
        while self.number < count and self._next() is not _END:
            pass

    def _walk(self) -> Iterator[Found]:
        while (row := self._next()) is not _END:
            given, (shard, shards) = self.number - 1, self.deal
            if not self.whole:
                yield Found(given * shards + shard, (0, given), row)
            elif self.deal.takes(given):
                yield Found(given, (0, given), row)

    def _next(self) -> Any:
        try:
            row = next(self._source, _END)
        except Exception as error:  # whatever the user's code raises
            raise ValueError(f"{self.place(self.number)} could not be read: {type(error).__name__}: {error}") from error
        if row is _END:
            return _END
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{self.place(self.number)} is a {type(row).__name__}; every row must be a mapping from column name to "
                "value"
            )
        if self.number < len(self._expected) and checksum_of(row) != self._expected[self.number]:
            raise ValueError(
                f"{self.place(self.number)} is another one than when it was read first: the source gives other rows in "
                "a worker process than in the main one, or at each time. Rows are dealt to workers here, so give "
                "all of them, in the same order, everywhere; or set num_workers=0"
            )
        self.number += 1
        return dict(row)
