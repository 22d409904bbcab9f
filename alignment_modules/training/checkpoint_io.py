"""Checkpoints that are whole or absent, and that cannot run code when they are read."""

import contextlib
import os
import pickle
import re
import socket
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities import rank_zero_warn


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file and what is wrong with it."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a failed or interrupted write leaves the previous file as it was.

    Give it to the Trainer as a plugin: `Trainer(plugins=[AtomicCheckpointIO()])`. The new file is complete on disk
    before it takes the old one's place; meanwhile there must be space for both. Reading always uses
    `weights_only=True`, and a checkpoint that could not be read so is reported when it is written. Remote paths are
    written by Lightning's own code.
    """

    def __init__(self) -> None:
        self._warned = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Writes a checkpoint.

        Args:
            checkpoint: What to save.
            path: Where to.
            storage_options: Not used; must be None.

        Raises:
            OSError: If it cannot be written; a previous file at `path` is untouched.
        """
        target = _local(path)
        if storage_options is not None or target is None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        temporary = target.with_name(f"{target.name}.{_host()}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target.parent)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            self._warn_if_unreadable(temporary, target)
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            kept = "the previous file there is untouched" if target.exists() else "nothing was left there"
            raise OSError(f"cannot write checkpoint {str(target)!r}: {_reason(error)}; {kept}") from error
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)

    def _warn_if_unreadable(self, written: Path, target: Path) -> None:
        """Reads back the structure, not the tensors' values, so that a run does not learn at resume what it lacks."""
        if self._warned:
            return
        try:
            torch.load(written, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            self._warned = True
            rank_zero_warn(
                f"checkpoint {str(target)!r} {_python_objects(error)}: resuming from it will be refused. Keep such "
                "objects out of save_hyperparameters and out of the state of callbacks and loaders."
            )

    def read_step(self, path: Path) -> int:
        """The optimizer step a checkpoint was taken at, read without its tensors.

        Args:
            path: The file, or the folder of a sharded one.

        Returns:
            Optimizer steps done.

        Raises:
            CheckpointError: If the file is damaged, or training cannot be resumed from it.
        """
        sharded = path.is_dir()
        file = path / "meta.pt" if sharded else path
        try:
            checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"checkpoint {str(path)!r} {_diagnosis(file, error)}") from error
        needed = ("global_step",) if sharded else ("state_dict", "optimizer_states", "global_step")
        missing = [key for key in needed if key not in checkpoint]
        if missing:
            raise CheckpointError(f"checkpoint {str(path)!r} lacks {missing[0]!r}: no fit can be resumed from it")
        return int(checkpoint["global_step"])

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint of tensors and plain values.

        Args:
            path: The file.
            map_location: Where tensors go; the default keeps them on the CPU.
            weights_only: None or True.

        Returns:
            The checkpoint.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If the file is truncated, holds other Python objects, or is no checkpoint of a Trainer.
            ValueError: If `weights_only=False` is asked for.
        """
        if weights_only is False:
            raise ValueError(
                "weights_only=False must be True or None: reading arbitrary Python objects can run code; "
                "for a file you trust, use Lightning's TorchCheckpointIO"
            )
        local = _local(path)
        if local is not None and local.is_dir():
            raise CheckpointError(
                f"checkpoint {str(path)!r} is a folder: a sharded checkpoint is read only by the strategy that wrote it"
            )
        try:
            checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
        except FileNotFoundError:
            raise
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"checkpoint {str(path)!r} {_diagnosis(local, error)}") from error
        # launchers that fork or spawn bring the weights home from rank 0 in a bare file of this name
        from_launcher = local is not None and local.name == ".temp.ckpt"
        if not isinstance(checkpoint, dict) or ("state_dict" not in checkpoint and not from_launcher):
            found = f"keys {sorted(map(str, checkpoint))[:8]}" if isinstance(checkpoint, dict) else type(checkpoint)
            raise CheckpointError(f"checkpoint {str(path)!r} lacks 'state_dict': no Trainer wrote it; it holds {found}")
        if "pytorch-lightning_version" not in checkpoint and not from_launcher:
            raise CheckpointError(
                f"checkpoint {str(path)!r} lacks 'pytorch-lightning_version': no Trainer wrote it; it holds keys "
                f"{sorted(map(str, checkpoint))[:8]}, where a Trainer's own also says how far training was"
            )
        return checkpoint


def write_error(error: BaseException | None) -> OSError | None:
    """The failed write behind an error; None where it is about something else.

    Args:
        error: What was raised; libraries wrap the operating system's error.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _local(path: _PATH) -> Path | None:
    """The path on this machine's file system; None for a remote one."""
    filesystem, plain = url_to_fs(str(path))
    return Path(plain) if "file" in filesystem.protocol else None


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed writers left: of a process that is gone from this machine, or untouched for an hour."""
    for file in folder.glob("*.ckpt.*.tmp"):
        _, host, process = file.stem.rsplit(".", 2)
        with contextlib.suppress(OSError):
            gone = host == _host() and process.isdecimal() and not _is_running(int(process))
            if gone or time.time() - file.stat().st_mtime > 3600:
                file.unlink()


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the operating system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The operating system's own words, which torch wraps."""
    found = write_error(error)
    if found is not None and found.strerror:
        return found.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _python_objects(error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    what = f" ({found[1]})" if found else ""
    return f"holds Python objects{what} beside tensors and plain values, which can run code when read"


def _diagnosis(path: Path | None, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return f"{_python_objects(error)}: refused"
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
