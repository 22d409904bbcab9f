"""The files of checkpoints: how they are called while they are written, and what may be wrong with them."""

import contextlib
import os
import pickle
import re
import shutil
import socket
import sys
import time
import zipfile
from pathlib import Path

from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from lightning.fabric.utilities.types import _PATH


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file and what is wrong with it."""


def write_error(error: BaseException | None) -> OSError | None:
    """The failed write behind an error; None where it is about something else.

    Args:
        error: What was raised; libraries wrap the operating system's error.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def local_path(path: _PATH) -> Path | None:
    """The path on this machine's file system; None for a remote one."""
    filesystem, plain = url_to_fs(str(path))
    return Path(plain) if "file" in filesystem.protocol else None


def temporary_name(target: Path) -> Path:
    """What a checkpoint is called while this process writes it."""
    return target.with_name(f"{target.name}.{_host()}.{os.getpid()}.tmp")


def make_room(folder: Path) -> None:
    """Makes a folder, and removes what killed writers left in it.

    That is what was of a process that is gone from this machine, or untouched for an hour.

    Args:
        folder: Where a checkpoint is to be written.

    Raises:
        OSError: It cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.ckpt.*.tmp"):
        _, host, process = left.stem.rsplit(".", 2)
        with contextlib.suppress(OSError):
            gone = host == _host() and process.isdecimal() and not _is_running(int(process))
            touched = max(path.stat().st_mtime for path in (left, *(left.iterdir() if left.is_dir() else ())))
            if gone or time.time() - touched > 3600:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _is_running(process: int) -> bool:
    if sys.platform == "win32":  # where signal 0 is a Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Makes a rename in a folder itself durable, where the operating system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cannot_write(target: Path, error: BaseException) -> OSError:
    """What to raise where a checkpoint cannot be written."""
    kept = "the previous file there is untouched" if target.exists() else "nothing was left there"
    return OSError(f"cannot write checkpoint {str(target)!r}: {_reason(error)}; {kept}")


def _reason(error: BaseException) -> str:
    """The operating system's own words, which torch wraps."""
    found = write_error(error)
    if found is not None and found.strerror:
        return found.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def python_objects(error: Exception) -> str:
    """What to say of a file whose objects torch refuses to read."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    what = f" ({found[1]})" if found else ""
    return f"holds Python objects{what} beside tensors and plain values, which can run code when read"


def diagnosis(path: Path | None, error: Exception) -> str:
    """What is wrong with a file that torch cannot read.

    Args:
        path: The file; None: a remote one.
        error: What torch raised.
    """
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return f"{python_objects(error)}: refused"
    if path is None:
        return f"cannot be read: {_reason(error)}"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as problem:
        return f"cannot be read: {_reason(problem)}"
    if size == 0:
        return "is empty (0 bytes): its write was interrupted; use an earlier checkpoint"
    if start == b"PK\x03\x04":
        if not zipfile.is_zipfile(path):
            return f"is truncated at {size:,} bytes: its write was interrupted; use an earlier checkpoint"
        return f"is damaged or no checkpoint: {_reason(error)}"
    return f"is not a checkpoint: {size:,} bytes that start with {start!r}"
