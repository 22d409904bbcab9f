"""A folder of entries, each made once, whole or not there, and checked when it is opened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from datamodules.cache.arrays import file_checksum, flush, open_array

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of what lies in the folder."""
UNFINISHED, USED = "unfinished-", "used"
"""What the names of folders begin with that are not whole yet, and the file of an entry that each use touches."""
_META = "entry.json"
_GIVEN_UP = 7 * 24 * 3600  # seconds after which what nobody finished is removed


class CacheError(OSError):
    """The folder of the cache cannot be used; the message says what to do."""


class Damaged(Exception):
    """An entry is not as it was written."""


def digest_of(values: Any) -> str:
    """A name for plain values, 32 characters; equal values have the same."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Entry:
    """What was made once.

    Attributes:
        folder: Where its files are.
        about: What it was made of, in words for people: `kind`, `source`, `rows`.
        facts: What its maker noted.
    """

    folder: Path
    about: dict[str, Any]
    facts: dict[str, Any]

    def array(self, name: str) -> np.ndarray:
        """Maps an array of it."""
        return open_array(self.folder / f"{name}.npy")


class Store:
    """Entries below a folder.

    Args:
        folder: The folder; it is made when something is first written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, digest: str) -> Entry | None:
        """The entry of that name; None: there is none.

        Raises:
            Damaged: It is not as it was written.
        """
        folder = self.folder / digest
        if not folder.is_dir():
            return None
        entry = read_entry(folder)
        with contextlib.suppress(OSError):
            (folder / USED).touch()
        return entry

    def obtain(self, digest: str, about: Mapping[str, Any], make: Callable[[Path], dict[str, Any]]) -> Entry:
        """The entry of that name, made if it is not there or damaged, by one process while others wait.

        Args:
            digest: Its name.
            about: `kind`, `source` and `rows`, for people.
            make: Fills a folder with files and returns plain values to note. The folder may hold what an earlier,
                unfinished making left; what lies in its folder `parts` is removed in the end.

        Raises:
            CacheError: The folder cannot be written.
        """
        with contextlib.suppress(Damaged):
            if entry := self.find(digest):
                return entry
        with self._locked(digest, about):
            try:
                if entry := self.find(digest):
                    return entry
            except Damaged as problem:
                logger.warning("%s: %s; it is made again", self.folder / digest, problem)
                self.remove(digest)
            self._sweep()
            unfinished = self.folder / f"{UNFINISHED}{digest}"
            with self.explained():
                unfinished.mkdir(exist_ok=True)
            facts = make(unfinished)
            with self.explained():
                _finish(unfinished, self.folder / digest, {"about": dict(about), "facts": facts})
        entry = self.find(digest)
        if entry is None:
            raise CacheError(f"{self.folder / digest} was removed while it was being made; start again")
        return entry

    def remove(self, name: str) -> None:
        """Removes an entry, or what is unfinished of one; who has it open keeps it."""
        gone = self.folder / f"{UNFINISHED}removed-{name}-{os.getpid()}"
        with self.explained(), contextlib.suppress(FileNotFoundError):
            (self.folder / name).rename(gone)  # so that no half of it is ever found
            shutil.rmtree(gone)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns an error of the file system into one that says what to do."""
        try:
            yield
        except CacheError:
            raise
        except OSError as error:
            raise CacheError(
                f"the cache of tables in {self.folder} cannot be written: {error.strerror or error}{self._left()}; "
                "free space (align cache shows what lies there), name another folder (cache.folder, or the environment "
                "variable ALIGNMENT_MODULES_CACHE), or keep tables in memory (cache=null)"
            ) from error

    def _left(self) -> str:
        with contextlib.suppress(OSError):
            return f" ({shutil.disk_usage(self.folder).free / 1e6:.0f} MB are free)"
        return ""

    @contextlib.contextmanager
    def _locked(self, digest: str, about: Mapping[str, Any]) -> Iterator[None]:
        """Holds the lock of an entry; it dies with the process."""
        with self.explained():
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "locks" / f"{digest}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("%s of %s: another process makes it; waiting for that", about["kind"], about["source"])
                lock.acquire(poll_interval=0.2)
        try:
            yield
        finally:
            lock.release()

    def _sweep(self) -> None:
        """Removes what others began long ago and did not finish."""
        for folder in self.folder.glob(f"{UNFINISHED}*"):
            with contextlib.suppress(OSError, Timeout):
                if time.time() - last_change(folder) > _GIVEN_UP:
                    with FileLock(self.folder / "locks" / f"{folder.name.removeprefix(UNFINISHED)}.lock", timeout=0):
                        self.remove(folder.name)


def read_entry(folder: Path) -> Entry:
    """Opens an entry and checks it: that all files have the size and the time, or the content, that they had.

    Raises:
        Damaged: It is not as it was written; the message says what.
    """
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        checksum = meta.pop("checksum")
        version, files = meta["format"], meta["files"]
        entry = Entry(folder, meta["about"], meta["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{_META} cannot be read ({type(error).__name__}: {error})") from None
    if version != FORMAT:
        raise Damaged(f"is of version {version!r}, not {FORMAT}")
    if checksum != _checksum(meta):
        raise Damaged(f"{_META} was changed")
    for name, (size, modified, content) in files.items():
        try:
            found = (folder / name).stat()
        except OSError:
            raise Damaged(f"{name} is missing") from None
        if found.st_size != size:
            raise Damaged(f"{name} has {found.st_size} bytes, not {size}")
        if found.st_mtime_ns != modified:  # perhaps only copied
            if file_checksum(folder / name) != content:
                raise Damaged(f"{name} was changed")
            with contextlib.suppress(OSError):
                os.utime(folder / name, ns=(found.st_atime_ns, modified))
    return entry


def _finish(unfinished: Path, target: Path, meta: dict[str, Any]) -> None:
    """Makes an entry of a filled folder, in one step."""
    shutil.rmtree(unfinished / "parts", ignore_errors=True)
    files = {}
    for path in sorted(unfinished.iterdir()):
        if path.name in (_META, USED):
            continue
        flush(path)
        found = path.stat()
        files[path.name] = [found.st_size, found.st_mtime_ns, file_checksum(path)]
    meta = {"format": FORMAT, **meta, "files": files}
    (unfinished / _META).write_text(json.dumps(meta | {"checksum": _checksum(meta)}, indent=1), encoding="utf-8")
    (unfinished / USED).touch()
    flush(unfinished / _META)
    flush(unfinished)
    unfinished.rename(target)
    flush(target.parent)


def _checksum(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def last_change(folder: Path) -> float:
    """When anything in a folder last changed, in seconds since 1970."""
    times = [0.0]
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):  # gone meanwhile
            times.append(path.stat().st_mtime)
    return max(times)
