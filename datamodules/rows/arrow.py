"""Rows that Arrow holds: a `datasets.Dataset`, and a Parquet file that is read where it lies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from datamodules.rows.identity import content_of_dataset, identity_of_file
from datamodules.rows.keeping import Keeper, KeepNothing
from datamodules.rows.rows import SequenceRows

_CHUNK = 1024  # rows made Python objects at a time


class DatasetRows(SequenceRows):
    """Rows of a `datasets.Dataset`.

    Args:
        rows: The data set.
        name: What error messages call it.
        identity: What it was loaded from, where that says all; None: its content is hashed.
    """

    def between(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The rows from `start` up to, and without, `stop`."""
        if self.rows.format["type"] is not None:  # several rows at once may come in another form than one
            yield from super().between(start, stop)
            return
        for first in range(start, stop, _CHUNK):
            columns = self.rows[first : min(first + _CHUNK, stop)]
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    def identity(self) -> Any:
        """What it was loaded from, else a hash of its content."""
        return content_of_dataset(self.rows) if self._identity is None else self._identity


class ParquetRows:
    """A Parquet file that is read where it lies, one row group after the other.

    Rows out of order are read from a copy in Arrow's own form, memory-mapped where it is kept, else in memory.

    Args:
        path: The file.
        keeper: Keeps that copy, which is made when a row is first asked for.

    Raises:
        ValueError: It is no Parquet file that can be read.
    """

    def __init__(self, path: Path, keeper: Keeper | None = None) -> None:
        self.path, self.name, self.keeper = path, str(path), keeper or KeepNothing()
        self._identity = identity_of_file(path)
        with self._named(), self._opened() as file:
            self._groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._count = sum(self._groups)
        self._head: list[dict[str, Any]] | None = None  # the first rows, which say what the others are
        self._table: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_head": None, "_table": None}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._table is None and 0 <= index < _CHUNK:
            if self._head is None:
                self._head = list(self.between(0, min(_CHUNK, self._count)))
            return dict(self._head[index])
        if self._table is None:
            self._table = self._indexed()
        row: dict[str, Any] = self._table.slice(index, 1).to_pylist()[0]
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.between(0, self._count)

    def between(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The rows from `start` up to, and without, `stop`."""
        ends = list(accumulate(self._groups))
        groups = [i for i, end in enumerate(ends) if end > start and end - self._groups[i] < stop]
        if start >= stop or not groups:
            return
        position = ends[groups[0]] - self._groups[groups[0]]
        with self._named(), self._opened() as file:
            for batch in file.iter_batches(_CHUNK, row_groups=groups):
                first, last = max(start - position, 0), min(stop - position, len(batch))
                if first < last:
                    yield from batch.slice(first, last - first).to_pylist()
                position += len(batch)
                if position >= stop:
                    return

    def where(self, index: int) -> str:
        """Describe the place of row `index`."""
        return f"row {index} of {self.name}"

    def identity(self) -> Any:
        """The file's path, size and time of the last change."""
        return self._identity

    def _indexed(self) -> Any:
        """The whole table, of which any row is at hand."""
        import pyarrow
        import pyarrow.parquet

        kept = self.keeper.copy(self.path, "arrow", self._count, self._write)
        with self._named():
            if kept is None:
                return pyarrow.parquet.read_table(self.path, partitioning=None)
            return pyarrow.ipc.open_file(pyarrow.memory_map(str(kept))).read_all()

    def _write(self, target: Path) -> None:
        import pyarrow

        with self._named(), self._opened() as file, pyarrow.ipc.new_file(str(target), file.schema_arrow) as copy:
            for batch in file.iter_batches(10 * _CHUNK):
                copy.write_batch(batch)

    def _opened(self) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.path, memory_map=True)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} is not a readable Parquet file: {error}") from error
