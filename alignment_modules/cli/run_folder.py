"""The folder of a run: whose it is, what an earlier run left in it, and which checkpoint is its last."""

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are not noticed
    fcntl = None  # type: ignore[assignment]

from alignment_modules.callbacks import AtomicCheckpointIO, CheckpointError

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_SAMPLES = ("samples.jsonl", "samples.html")
_OWN = ("config.yaml", "hparams.yaml", *_SAMPLES, "checkpoints", "export", "events.out.tfevents.*")
_EMPTY = 200  # bytes of an event file in which nothing was logged


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from fitting into a folder; the lock ends with the process, however that ends.

    Args:
        folder: The folder; it is made.

    Raises:
        ValueError: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    path = folder / _LOCK
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"trainer.default_root_dir={str(folder)!r}: another run writes into it now ({file.read().strip()}). "
                "Give this one a folder of its own with --trainer.default_root_dir"
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def earlier_run(folder: Path) -> list[Path]:
    """The files and folders that an earlier fit wrote, if there was one.

    Args:
        folder: The run's folder.

    Returns:
        Paths directly below it; none where no fit has written. A folder from which Lightning requeues a SLURM job holds
        no earlier run but this one.
    """
    found = sorted(path for pattern in _OWN for path in folder.glob(pattern))
    began = any(path.name in ("config.yaml", "checkpoints", "export") for path in found)
    requeued = any(folder.glob("hpc_ckpt_*.ckpt"))
    return found if began and not requeued else []


def set_aside(folder: Path, entries: Iterable[Path]) -> Path | None:
    """Moves what an earlier run left to `FOLDER.1`, or the next number that is free; nothing is lost.

    What a run left that ended before it logged or saved anything is removed.

    Args:
        folder: The run's folder.
        entries: What `earlier_run` found before this run began.

    Returns:
        Where the earlier run is now; None where it had left nothing.

    Raises:
        OSError: If something cannot be moved.
    """
    entries = [entry for entry in entries if entry.exists()]
    if not any(_is_worth_keeping(entry) for entry in entries):
        for entry in entries:
            entry.unlink() if entry.is_file() else _remove_empty(entry)
        return None
    folder = folder.resolve()
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    target.mkdir()
    for entry in entries:
        entry.rename(target / entry.name)
    return target


def _is_worth_keeping(entry: Path) -> bool:
    if entry.is_dir():
        return any(path.is_file() for path in entry.rglob("*"))
    if entry.name.startswith("events.out."):
        return entry.stat().st_size > _EMPTY
    return entry.name in _SAMPLES


def _remove_empty(folder: Path) -> None:
    for inner in sorted(folder.rglob("*"), reverse=True):
        inner.rmdir()
    folder.rmdir()


def last_checkpoint(root: Path, others: Iterable[Path] = (), asked: str = "last") -> Path:
    """What `--ckpt_path last` means: the checkpoint with the most optimizer steps of the newest run.

    Args:
        root: The run's folder; checkpoints of all loggers and at any depth below it count.
        others: More folders, such as a `ModelCheckpoint`'s own `dirpath`.
        asked: What `ckpt_path` was, for the message.

    Returns:
        The file. Where the one with the most steps cannot be read, the one before; which is said in the log.

    Raises:
        ValueError: If there is none.
    """
    folders = list(dict.fromkeys(folder.expanduser().resolve() for folder in (root, *others)))
    runs: dict[Path, set[Path]] = {}
    for folder in folders:
        for path in folder.rglob("*.ckpt"):
            if path.exists() and not path.name.startswith("."):  # a link may lead nowhere
                runs.setdefault(_run_of(path, folder), set()).add(path)
    if not runs:
        names = " and ".join(map(str, folders))
        raise ValueError(f"ckpt_path={asked!r}: {names} holds no checkpoint (*.ckpt) to resume from")
    newest = max(_without_old_versions(runs), key=lambda run: max(path.stat().st_mtime_ns for path in runs[run]))
    steps, damaged = {}, {}
    for path in runs[newest]:
        try:
            steps[path] = AtomicCheckpointIO().read_step(path)
        except CheckpointError as error:
            damaged[path] = str(error)
    if not steps:
        raise ValueError(f"ckpt_path='last': no checkpoint of {newest} can be used; {'; '.join(damaged.values())}")
    found = max(steps, key=lambda path: (steps[path], path.stat().st_mtime_ns))
    for message in damaged.values():
        logger.warning("ckpt_path='last': %s; taking %s instead", message, found)
    return found


def _run_of(path: Path, folder: Path) -> Path:
    """The folder of the run that a checkpoint belongs to: the one above `checkpoints`, else the one searched.

    A `/` in a file's name, as of `val/loss`, makes folders below `checkpoints`.
    """
    inner = path.relative_to(folder).parts[:-1]
    return folder.joinpath(*inner[: inner.index("checkpoints")]) if "checkpoints" in inner else folder


def _without_old_versions(runs: Iterable[Path]) -> list[Path]:
    """Of the folders `version_0`, `version_1` ... beside each other, the last alone."""
    versions: dict[Path, tuple[int, Path]] = {}
    others = []
    for run in runs:
        match = re.fullmatch(r"version_(\d+)", run.name)
        if match is None:
            others.append(run)
        else:
            versions[run.parent] = max(versions.get(run.parent, (-1, run)), (int(match[1]), run))
    return [*others, *(run for _, run in versions.values())]
