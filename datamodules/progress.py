"""How far tokenising is, on a terminal: rows a second, and what is lost so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


def lost(report: Mapping[str, Any]) -> Counter[str]:
    """The counts of a report that say what is cut or left out."""
    names = [name for name in report if name.startswith("dropped") or name in ("truncated", "ties")]
    return Counter({name: report[name] for name in names})


class Progress:
    """A bar that shows where standard error is a terminal and tokenising takes more than a second.

    Args:
        split: Name of the split.
        rows: How many rows there are.
        shown: False: it never shows.
    """

    def __init__(self, split: str, rows: int, shown: bool) -> None:
        self._bar = tqdm(
            desc=f"tokenising {split}",
            total=rows,
            unit=" rows",
            disable=None if shown else True,  # None: where the output is no terminal
            delay=1.0,
            leave=False,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, rows: int, lost: Mapping[str, int]) -> None:
        """More rows are done.

        Args:
            rows: How many.
            lost: What is lost of all that are done, by name.
        """
        self._bar.set_postfix(lost, refresh=False)
        self._bar.update(rows)
