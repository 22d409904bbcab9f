"""What is found out about a source once, and kept for later starts by whoever opens it."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


class Lines(NamedTuple):
    """Places of rows in a file.

    Attributes:
        offsets: Where each row begins, in bytes, int64 `[rows]`.
        lines: The number of the line on which it does, from 1, int64 `[rows]`.
    """

    offsets: np.ndarray
    lines: np.ndarray

    @classmethod
    def of(cls, offsets: array[int], lines: array[int]) -> Lines:
        """Of arrays of type "q", whose memory it takes over."""
        return cls(np.frombuffer(offsets, dtype=np.int64), np.frombuffer(lines, dtype=np.int64))


class Keeper(Protocol):
    """Keeps what was made of a file, for as long as the file stays as it is."""

    def lines(self, path: Path, kind: str, find: Callable[[], Lines]) -> Lines:
        """The places of a file's rows.

        Args:
            path: The file.
            kind: How its rows are told from each other.
            find: Finds them.
        """
        ...

    def copy(self, path: Path, kind: str, rows: int, write: Callable[[Path], None]) -> Path | None:
        """A copy of a file in a form that any row is quickly read from.

        Args:
            path: The file.
            kind: The form.
            rows: How many rows it has.
            write: Writes the copy to a path.

        Returns:
            Where the copy is; None: none is kept.
        """
        ...


class KeepNothing:
    """Finds what is asked for each time anew."""

    def lines(self, path: Path, kind: str, find: Callable[[], Lines]) -> Lines:
        """What `find` finds."""
        return find()

    def copy(self, path: Path, kind: str, rows: int, write: Callable[[Path], None]) -> Path | None:
        """None."""
        return None
