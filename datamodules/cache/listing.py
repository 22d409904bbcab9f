"""What lies in the cache, how large it is and when it was last used; and its removal."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from datamodules.cache.store import UNFINISHED, USED, Damaged, Store, last_change, read_entry


@dataclass(frozen=True)
class Listed:
    """An entry, or what is unfinished or damaged of one.

    Attributes:
        name: Name of its folder.
        kind: What it is.
        source: What it was made of; "" where it does not say.
        rows: How many rows that has; None where it does not say.
        size: Its bytes on the disk.
        used: When it was last used, in seconds since 1970.
    """

    name: str
    kind: str
    source: str
    rows: int | None
    size: int
    used: float


def listed(folder: Path) -> list[Listed]:
    """All that lies in a folder of the cache, what was used last first.

    Args:
        folder: The folder; it need not exist.
    """
    found = [_listed(place) for place in folder.iterdir() if _is_entry(place)] if folder.is_dir() else []
    return sorted(found, key=lambda one: one.used, reverse=True)


def clear(folder: Path, unused: float = 0.0) -> tuple[list[Listed], list[Listed]]:
    """Removes what lies in a folder of the cache; a run that has it open keeps it.

    Args:
        folder: The folder.
        unused: Seconds since the last use that an entry must be older than.

    Returns:
        What was removed, and what was left because a process is making it.

    Raises:
        CacheError: The folder cannot be written.
    """
    removed, left = [], []
    for one in listed(folder):
        if time.time() - one.used < unused:
            continue
        lock = FileLock(folder / "locks" / f"{one.name.removeprefix(UNFINISHED)}.lock")
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(lock.acquire(timeout=0))
            except Timeout:
                left.append(one)
                continue
            Store(folder).remove(one.name)
            removed.append(one)
    return removed, left


def _is_entry(place: Path) -> bool:
    """Whether a folder was made here: nothing else is ever removed."""
    name = place.name.removeprefix(UNFINISHED)
    return place.is_dir() and (name != place.name or (len(name) == 32 and set(name) <= {*"0123456789abcdef"}))


def _listed(place: Path) -> Listed:
    size, used = 0, last_change(place)
    for file in place.rglob("*"):
        with contextlib.suppress(OSError):
            size += file.stat().st_blocks * 512 if file.is_file() else 0
    if place.name.startswith(UNFINISHED):
        return Listed(place.name, "unfinished", "", None, size, used)
    try:
        about = read_entry(place).about
    except Damaged:
        return Listed(place.name, "damaged", "", None, size, used)
    with contextlib.suppress(OSError):
        used = (place / USED).stat().st_mtime
    return Listed(place.name, about["kind"], about["source"], about["rows"], size, used)
