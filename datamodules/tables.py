"""Rows with columns of their source: prompts beside all of them, other rows beside those that are asked for."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from datamodules.batching import Ragged, Table
from datamodules.rows.rows import Rows


def row_checksum(row: Mapping[str, Any], start: int = 0) -> int:
    """A checksum of a row's values, continued from `start`; of objects that are no data only the type counts."""
    try:
        text = json.dumps(dict(row), default=_plain, skipkeys=True)
    except (TypeError, ValueError):
        text = ""
    return zlib.crc32(text.encode(), start)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # an array, a tensor or one of their numbers
        return value.tolist()
    if hasattr(value, "isoformat"):  # a date or a time
        return value.isoformat()
    return value.hex() if isinstance(value, bytes) else type(value).__name__


class PromptTable(Table):
    """Prompts as token ids, with the source's other columns read when asked for.

    Args:
        prompts: Token ids of each prompt.
        index: Row number of each in the source.
        rows: The source.
        columns: Names of the columns that every row passes on (None where a row lacks one).
        canonical: Makes of a row what stands beside its ids: its prompt, text or messages, as `prompt`, and where the
            source has answers, the text of its own as `completion`.
        checksum: A checksum of the source's rows.
    """

    def __init__(
        self,
        prompts: Ragged,
        index: np.ndarray,
        rows: Rows,
        columns: list[str],
        canonical: Callable[[dict[str, Any]], dict[str, Any]],
        checksum: int = 0,
    ) -> None:
        self.prompts, self.index, self.rows, self.columns, self.canonical = prompts, index, rows, columns, canonical
        self.source_rows = index
        self.fingerprint = f"{prompts.checksum(checksum):08x}"

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each prompt."""
        return self.prompts.lengths

    def row(self, index: int) -> dict[str, Any]:
        """`prompts` (ids), `index` (row number in the source), the columns, `prompt` and perhaps `completion`."""
        source = int(self.index[index])
        values = self.rows[source]
        own = {name: values.get(name) for name in self.columns}
        return {"prompts": self.prompts[index], "index": source, **own, **self.canonical(values)}


class CarryingTable(Table):
    """A table whose rows have further columns.

    Args:
        table: The table.
        columns: One value a row of each column, by name.
    """

    def __init__(self, table: Table, columns: dict[str, list[Any]]) -> None:
        self.table, self.columns, self.source_rows = table, columns, table.source_rows
        self.fingerprint = f"{row_checksum(columns, int(table.fingerprint, 16)):08x}"

    def __len__(self) -> int:
        return len(self.table)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row of the table."""
        return self.table.lengths

    def row(self, index: int) -> dict[str, Any]:
        """The table's row and the columns' values."""
        return self.table.row(index) | {name: values[index] for name, values in self.columns.items()}


class CarryingCollate:
    """Batches of `CarryingTable` rows: what another makes of them, and each column as a list.

    Args:
        collate: Makes a batch of the rows without the columns.
        names: Names of the columns.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], names: tuple[str, ...]) -> None:
        self.collate, self.names = collate, names

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch."""
        return self.collate(rows) | {name: [row[name] for row in rows] for name in self.names}
