"""Tables of rows, whatever holds them, as one indexable `Rows`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from datamodules.rows.strict_json import strict_json


class Rows(Protocol):
    """An indexable table of rows; `where` says in words where a row stands, for error messages."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def where(self, index: int) -> str:
        """Describe the place of row `index` ("data.jsonl:17" or "row 17 of [...]")."""
        ...


class SequenceRows:
    """Rows of anything with `__len__` and `__getitem__`: a list, a torch map-style Dataset, a `datasets.Dataset`.

    Args:
        rows: The rows, each a mapping from column name to value.
        name: What error messages call the source.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.rows = rows
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{self.where(index)} is a {type(row).__name__}; every row must be a mapping from column name to value"
            )
        return dict(row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """Describe the place of row `index`."""
        return f"row {index} of {self.name}"


def parse_line(path: Path, raw: bytes, line: int, *, check: bool = True) -> dict[str, Any]:
    """The row that a line of a JSON Lines file holds.

    Args:
        path: The file, for messages.
        raw: The line.
        line: Its number, from 1.
        check: Whether to read strictly; a line that was, once, need not be again.

    Raises:
        ValueError: The line is not valid UTF-8 or JSON, or not an object; the message starts with `path:line`.
    """
    try:
        text = raw.decode("utf-8-sig")
        row = strict_json(text) if check else json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{line}: not valid JSON: {error.msg} at column {error.colno}; each line must hold one JSON object"
        ) from None
    except ValueError as error:  # what JSON allows and cannot be used
        raise ValueError(f"{path}:{line}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{path}:{line}: holds a JSON {type(row).__name__}; each line must hold one JSON object "
            'such as {"prompt": ..., "completion": ...}'
        )
    return row


class JsonlRows:
    """A JSON Lines file that stays on disk: every line is checked once, then rows are parsed when asked for.

    Blank lines are skipped. Only line offsets are held in memory (8 bytes a row), and no column types are unified, so
    rows may have different columns.

    Args:
        path: The file.

    Raises:
        ValueError: A line is not valid UTF-8 or JSON, or not an object; the message starts with `path:line`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        offsets, lines, offset = [], [], 0
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    parse_line(path, raw, number)
                    offsets.append(offset)
                    lines.append(number)
                offset += len(raw)
        self._offsets = np.asarray(offsets, dtype=np.int64)
        self._lines = np.asarray(lines, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[index]))
            return parse_line(self.path, file.readline(), int(self._lines[index]), check=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield parse_line(self.path, raw, number, check=False)

    def where(self, index: int) -> str:
        """Describe the place of row `index` as `path:line`."""
        return f"{self.path}:{int(self._lines[index])}"


class ConcatRows:
    """Several tables one after the other.

    Args:
        parts: The tables, in order.
        name: What error messages call the whole.
    """

    def __init__(self, parts: Sequence[Rows], name: str) -> None:
        self.parts = list(parts)
        self.name = name
        self._ends = np.cumsum([len(part) for part in self.parts])

    def _locate(self, index: int) -> tuple[Rows, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part], index - (int(self._ends[part - 1]) if part else 0)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows, index = self._locate(index)
        return rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part in self.parts:
            yield from part

    def where(self, index: int) -> str:
        """Describe the place of row `index` in its own part."""
        rows, index = self._locate(index)
        return rows.where(index)


class RenamedRows:
    """Rows with some columns under other names.

    Args:
        rows: The rows.
        names: New name of each old one.
        first: The row that must have the columns; None: the table's first.

    Raises:
        ValueError: That row lacks a column that is to be renamed, or a new name is already taken.
    """

    def __init__(self, rows: Rows, names: Mapping[str, str], first: Mapping[str, Any] | None = None) -> None:
        self.rows, self.names, self.name = rows, dict(names), rows.name
        first = rows[0] if first is None else first
        unknown = sorted(set(names) - set(first))
        if unknown:
            raise ValueError(f"columns={dict(names)}: {rows.name} has no column {unknown}; found {sorted(first)}")
        twice = sorted({new for new in names.values() if list(names.values()).count(new) > 1})
        if twice:
            raise ValueError(f"columns={dict(names)}: two columns would be called {twice[0]!r}")

    def __len__(self) -> int:
        return len(self.rows)

    def _rename(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        new = set(self.names.values())
        lost = sorted(name for name in new - set(self.names) if row.get(name) is not None)
        if lost:
            raise ValueError(
                f"columns={self.names}: {self.where(index)} already has a column {lost[0]!r}, which would be lost; "
                f"rename it too, as in '{lost[0]}': '{lost[0]}_column'"
            )
        kept = {name: value for name, value in row.items() if name not in self.names and name not in new}
        return {**kept, **{self.names[name]: row[name] for name in self.names if name in row}}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rename(self.rows[index], index)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._rename(row, index) for index, row in enumerate(self.rows))

    def where(self, index: int) -> str:
        """Describe the place of row `index`."""
        return self.rows.where(index)
