"""Which rows belong to which split: files of a folder by their names, and a share of the training rows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datamodules.rows.rows import Rows

_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}


def split_files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    """Data files of a folder by the split that their name, or the sub-folder that they lie in, names.

    A name names a split where one of its words does: `train.jsonl`, `my-dev_1.csv`, `test-00000-of-00002.parquet`.

    Returns:
        Files in order, by "train", "validation" and "test" (only those that have some), or nothing.
    """
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.suffix.lower() not in suffixes or any(part.startswith(".") for part in parts) or not file.is_file():
            continue
        names = next((named for part in (file.stem, *reversed(parts[:-1])) if (named := named_splits(part))), [])
        if len(names) == 1:
            found.setdefault(names[0], []).append(file)
    return found


def named_splits(name: str) -> list[str]:
    """The splits that the words of a name name."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return [split for split, spellings in _NAMES.items() if words.intersection(spellings)]


def check_share(share: Any, train: Any) -> None:
    """Refuse a share that is none.

    Raises:
        ValueError: The share is not between 0 and 1, or there are no training rows to take it from.
    """
    if isinstance(share, (bool, int)) or not 0 < share < 1:
        raise ValueError(f"validation={share!r}; a share of the training rows must be between 0 and 1, such as 0.05")
    if train is None:
        raise ValueError(f"validation={share!r} is a share of the training rows, but train=None")


class SelectedRows:
    """Some rows of a table, in their order.

    Args:
        rows: The table.
        chosen: Whether each row is taken, bool `[rows]`.
    """

    def __init__(self, rows: Rows, chosen: np.ndarray) -> None:
        self.rows, self.chosen, self.name = rows, chosen, rows.name
        self.numbers = np.flatnonzero(chosen)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[int(self.numbers[index])]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.between(0, len(self))

    def between(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The rows from `start` up to, and without, `stop`; those of the table that lie between are read, too."""
        if start >= stop:
            return iter(())
        first, last = int(self.numbers[start]), int(self.numbers[stop - 1])
        return compress(self.rows.between(first, last + 1), self.chosen[first : last + 1].tolist())

    def where(self, index: int) -> str:
        """Describe the place of row `index` in the table."""
        return self.rows.where(int(self.numbers[index]))

    def identity(self) -> Any:
        """The table's own, and a hash of the choice."""
        rows = self.rows.identity()
        choice = hashlib.sha256(np.packbits(self.chosen).tobytes()).hexdigest()
        return None if rows is None else {"rows": rows, "chosen": choice}


def take_share(rows: Rows, share: float, seed: int, split: str) -> SelectedRows:
    """The rows that a share leaves to training, or those that it takes for validation; each row is in one of the two.

    Args:
        rows: All training rows.
        share: Share of the rows for validation, between 0 and 1; at least one row, and not all.
        seed: The choice depends on it and on the number of rows alone.
        split: "train" or "validation".

    Raises:
        ValueError: There are fewer than two rows.
    """
    count = len(rows)
    if count < 2:
        raise ValueError(f"validation={share}: {rows.name} has {count} row, so there is none to split off")
    taken = np.zeros(count, dtype=bool)
    size = min(max(round(count * share), 1), count - 1)
    taken[np.random.default_rng([seed, count]).permutation(count)[:size]] = True
    return SelectedRows(rows, taken if split == "validation" else ~taken)


def first_rows(rows: Rows, count: int) -> SelectedRows:
    """The first rows of a table, at most `count`."""
    return SelectedRows(rows, np.arange(len(rows)) < count)
