"""Checkpoints that are whole or absent, and that cannot run code when they are read."""

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities import rank_zero_warn

from alignment_modules.training.checkpoint_files import (
    CheckpointError,
    cannot_write,
    diagnosis,
    local_path,
    make_room,
    python_objects,
    sync_folder,
    temporary_name,
)
from alignment_modules.training.sharded_io import ShardedFolder, is_checkpoint_folder, read_as_file


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
        target = local_path(path)
        if storage_options is not None or target is None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        written = temporary_name(target)
        try:
            make_room(target.parent)
            with open(written, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            self._warn_if_unreadable(written, target)
            os.replace(written, target)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            with contextlib.suppress(OSError):
                written.unlink(missing_ok=True)
            raise cannot_write(target, error) from error
        except BaseException:
            with contextlib.suppress(OSError):
                written.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)

    def _warn_if_unreadable(self, written: Path, target: Path) -> None:
        """Reads back the structure, not the tensors' values, so that a run does not learn at resume what it lacks."""
        if self._warned:
            return
        try:
            torch.load(written, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            self._warned = True
            rank_zero_warn(
                f"checkpoint {str(target)!r} {python_objects(error)}: resuming from it will be refused. Keep such "
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
        if path.is_dir():
            checkpoint, needed = ShardedFolder(path).read_rest(), ["global_step"]
        else:
            checkpoint, needed = self.map_checkpoint(path), ["optimizer_states", "global_step"]
        missing = [key for key in needed if key not in checkpoint]
        if missing:
            raise CheckpointError(f"checkpoint {str(path)!r} lacks {missing[0]!r}: no fit can be resumed from it")
        return int(checkpoint["global_step"])

    def map_checkpoint(self, path: _PATH) -> dict[str, Any]:
        """Reads a checkpoint of one file whose tensors stay in it until they are used, so that a part costs a part.

        Args:
            path: The file; a remote one is read whole.

        Returns:
            The checkpoint. Its tensors are of the file as it was.

        Raises:
            FileNotFoundError, CheckpointError: As `load_checkpoint`.
        """
        local = local_path(path)
        if local is None:
            return self.load_checkpoint(path)
        return _checked(path, lambda: torch.load(local, map_location="cpu", mmap=True, weights_only=True))

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint of tensors and plain values, whole.

        Args:
            path: The file, or the folder of a sharded one, which is put together.
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
        local = local_path(path)
        if local is not None and is_checkpoint_folder(local):
            return read_as_file(local)
        return _checked(path, lambda: super(AtomicCheckpointIO, self).load_checkpoint(path, map_location, True))


def _checked(path: _PATH, load: Callable[[], Any]) -> dict[str, Any]:
    """What is loaded, if a Trainer wrote it; errors say what is wrong with the file."""
    local = local_path(path)
    if local is not None and local.is_dir():
        raise CheckpointError(f"checkpoint {str(path)!r} is a folder, and none that a strategy with shards wrote")
    try:
        checkpoint = load()
    except FileNotFoundError:
        raise
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"checkpoint {str(path)!r} {diagnosis(local, error)}") from error
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
