"""Where tables are kept, which, and how they are made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from datamodules.ranges import Count, Range, check_options

VARIABLE = "ALIGNMENT_MODULES_CACHE"
"""The environment variable that names the folder."""
_MOST_PROCESSES = 16  # that are started where their number is not given


def cache_folder(folder: str | None = None) -> Path:
    """Where tables are kept.

    Args:
        folder: The folder; None: what the environment names, else `alignment_modules` in the user's cache.
    """
    found = folder or os.environ.get(VARIABLE)
    if found:
        return Path(found).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "alignment_modules"


@dataclass(frozen=True)
class CacheOptions:
    """Tokenised tables on disk.

    Attributes:
        folder: Where they are kept; none takes the environment variable `ALIGNMENT_MODULES_CACHE`, else the folder
            `alignment_modules` in `XDG_CACHE_HOME` (`~/.cache`).
        num_proc: Processes that tokenise; none takes one for each processor that this one may use, at most 16.
        least_rows: Splits of fewer rows are tokenised in memory at every start.

    Raises:
        ValueError: If a number is out of its range.
    """

    folder: str | None = None
    num_proc: Annotated[int, Range(1, 1024)] | None = None
    least_rows: Count = 20_000

    def __post_init__(self) -> None:
        check_options(CacheOptions, vars(self), "cache.")

    @property
    def path(self) -> Path:
        """The folder."""
        return cache_folder(None if self.folder is None else str(self.folder))

    @property
    def processes(self) -> int:
        """How many processes tokenise."""
        return self.num_proc or min(len(os.sched_getaffinity(0)) if _ASKS else os.cpu_count() or 1, _MOST_PROCESSES)


_ASKS = hasattr(os, "sched_getaffinity")
