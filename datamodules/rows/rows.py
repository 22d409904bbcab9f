"""Tables of rows, whatever holds them, as one indexable `Rows`."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from datamodules.rows.identity import content_of, identity_of_file
from datamodules.rows.keeping import Keeper, KeepNothing, Lines
from datamodules.rows.strict_json import strict_json


class Rows(Protocol):
    """An indexable table of rows; `where` says in words where a row stands, for error messages."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def between(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The rows from `start` up to, and without, `stop`, read one after the other."""
        ...

    def where(self, index: int) -> str:
        """Describe the place of row `index` ("data.jsonl:17" or "row 17 of [...]")."""
        ...

    def identity(self) -> Any:
        """Plain values that are equal only where the rows are; None where that cannot be told."""
        ...


class SequenceRows:
    """Rows of anything with `__len__` and `__getitem__`: a list, a torch map-style Dataset, a `datasets.Dataset`.

    Args:
        rows: The rows, each a mapping from column name to value.
        name: What error messages call the source.
        identity: What the rows were read from, where that says all; None: their content is hashed.
    """

    def __init__(self, rows: Any, name: str, identity: Any = None) -> None:
        self.rows = rows
        self.name = name
        self._identity = identity

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
        return self.between(0, len(self))

    def between(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The rows from `start` up to, and without, `stop`."""
        return (self[index] for index in range(start, stop))

    def where(self, index: int) -> str:
        """Describe the place of row `index`."""
        return f"row {index} of {self.name}"

    def identity(self) -> Any:
        """What they were read from, else a hash of them; None where they hold anything but data."""
        return content_of(self) if self._identity is None else self._identity


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
        text = raw.decode("utf-8-sig").rstrip()  # else what is cut short ends behind the line
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

    Blank lines are skipped. Only line offsets are held in memory (16 bytes a row), and no column types are unified, so
    rows may have different columns.

    Args:
        path: The file.
        keeper: Keeps the places of its rows, so that a later start need not read the file.

    Raises:
        ValueError: A line is not valid UTF-8 or JSON, or not an object; the message starts with `path:line`.
    """

    def __init__(self, path: Path, keeper: Keeper | None = None) -> None:
        self.path = path
        self.name = str(path)
        self._identity = identity_of_file(path)
        self._places = (keeper or KeepNothing()).lines(path, "jsonl", self._find)

    def _find(self) -> Lines:
        offsets, lines, offset = array("q"), array("q"), 0
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    parse_line(self.path, raw, number)
                    offsets.append(offset)
                    lines.append(number)
                offset += len(raw)
        return Lines.of(offsets, lines)

    def __len__(self) -> int:
        return len(self._places.offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(int(self._places.offsets[index]))
            return parse_line(self.path, file.readline(), int(self._places.lines[index]), check=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.between(0, len(self))

    def between(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The rows from `start` up to, and without, `stop`."""
        if start >= stop:
            return
        with self.path.open("rb") as file:
            file.seek(int(self._places.offsets[start]))
            for line in self._places.lines[start:stop].tolist():
                while not (raw := file.readline()).strip():
                    if not raw:
                        raise ValueError(f"{self.path}:{line}: the file ends here; it was longer when it was opened")
                yield parse_line(self.path, raw, line, check=False)

    def where(self, index: int) -> str:
        """Describe the place of row `index` as `path:line`."""
        return f"{self.path}:{int(self._places.lines[index])}"

    def identity(self) -> Any:
        """The file's path, size and time of the last change."""
        return self._identity


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
        return self.between(0, len(self))

    def between(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The rows from `start` up to, and without, `stop`."""
        for part, end in zip(self.parts, self._ends.tolist(), strict=True):
            first = end - len(part)
            if first < stop and start < end:
                yield from part.between(max(start - first, 0), min(stop, end) - first)

    def where(self, index: int) -> str:
        """Describe the place of row `index` in its own part."""
        rows, index = self._locate(index)
        return rows.where(index)

    def identity(self) -> Any:
        """The parts' own; None where one has none."""
        parts = [part.identity() for part in self.parts]
        return None if None in parts else parts


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
        return self.between(0, len(self))

    def between(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The rows from `start` up to, and without, `stop`."""
        return (self._rename(row, index) for index, row in enumerate(self.rows.between(start, stop), start))

    def where(self, index: int) -> str:
        """Describe the place of row `index`."""
        return self.rows.where(index)

    def identity(self) -> Any:
        """The rows' own, and the names."""
        rows = self.rows.identity()
        return None if rows is None else {"rows": rows, "columns": sorted(self.names.items())}
