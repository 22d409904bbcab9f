"""How a strategy that shards weights saves and resumes: in a folder, or in a single file."""

import io
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from alignment_modules.policies.sharded import sharded_parts
from alignment_modules.policies.sharded_state import empty_for, fill, gather, own_state
from alignment_modules.training.checkpoint_files import local_path
from alignment_modules.training.checkpoint_io import AtomicCheckpointIO
from alignment_modules.training.frozen_weights import check_keys
from alignment_modules.training.sharded_io import ShardedFolder, is_checkpoint_folder, split, write_sharded

ENTRY = "alignment_module"
"""Under which key a checkpoint holds what this library adds to it."""
_WEIGHT = "state_dict."


class ShardedCheckpoints(ModelParallelStrategy):
    """Lightning's strategy, with checkpoints that are whole or absent, and read only once the module agreed to them.

    A folder holds the parts that the processes wrote, and any number of processes reads it. A single file is the one
    that a run without shards writes, put together tensor by tensor in the first process; each process reads its parts
    of it. What checkpoints leave out (companions, frozen weights) they leave out here, too.

    """

    saves_folder: bool
    """Whether it saves a folder; otherwise a single file."""
    _folder: ShardedFolder | None = None

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are restored by Lightning, after the module has seen the checkpoint."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The parts of the weights that this process holds."""
        return own_state(cast(torch.nn.Module, self.lightning_module))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The parts of an optimizer's state that this process holds."""
        return cast(Any, getattr(optimizer, "optimizer", optimizer)).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Writes a checkpoint; all processes call this.

        Raises:
            TypeError: If there are storage options, which nothing would follow.
            OSError: If it cannot be written; what was there is untouched.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__}.save_checkpoint(storage_options=...) is not supported")
        path = self.broadcast(filepath)
        if self.saves_folder:
            write_sharded(*split(checkpoint), _on_disk(path))
            return
        whole = gather(checkpoint, keep=self.is_global_zero)
        if self.is_global_zero:
            if is_checkpoint_folder(path):
                shutil.rmtree(path)
            self.checkpoint_io.save_checkpoint(whole, path)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads all of a checkpoint but its tensors, which are read later.

        Raises:
            FileNotFoundError: If there is none.
            CheckpointError: If it is damaged, or no Trainer wrote it.
        """
        checkpoint, self._folder = open_checkpoint(self.broadcast(checkpoint_path))
        return checkpoint

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Reads the weights of this process.

        Raises:
            RuntimeError: If `strict` and their names differ from the module's; nothing is read then.
        """
        module = cast(Any, self.lightning_module)
        where = f"checkpoint {str(module.trainer.ckpt_path)!r}"
        read_weights(module, checkpoint, self._folder, where, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Reads the parts of the optimizers' state that this process holds."""
        states = [
            self._read_state(number, optimizer, saved)
            for number, (optimizer, saved) in enumerate(
                zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
            )
        ]
        super(ModelParallelStrategy, self).load_optimizer_state_dict({"optimizer_states": states})

    def _read_state(self, number: int, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[Any, dict[str, Any]] = {index: {} for index in saved["state"]}
        for index, entries in saved["state"].items():
            for key, value in entries.items():
                state[index][key] = value
                if isinstance(value, Tensor):
                    state[index][key] = empty_for(parameters[index], value.shape, value.dtype)
                    fill(state[index][key], value)
        if self._folder is not None:
            prefix, wanted = f"optimizer_states.{number}.", {}
            for name, (size, dtype) in self._folder.tensors.items():
                if name.startswith(prefix):
                    index, _, key = name.removeprefix(prefix).partition(".")
                    wanted[name] = state[int(index)][key] = empty_for(parameters[int(index)], size, dtype)
            self._folder.read_into(wanted, together=True)
        return {**saved, "state": state}


def open_checkpoint(path: _PATH) -> tuple[dict[str, Any], ShardedFolder | None]:
    """A checkpoint whose tensors are not read yet: all but those in its folder, and the folder where it is one.

    Raises:
        FileNotFoundError: If there is none.
        CheckpointError: If it is damaged, or no Trainer wrote it.
    """
    if not is_checkpoint_folder(path):
        return AtomicCheckpointIO().map_checkpoint(path), None
    folder = ShardedFolder(path)
    return folder.read_rest(), folder


def weight_names(checkpoint: Mapping[str, Any], folder: ShardedFolder | None) -> set[str]:
    """The names of the weights that an open checkpoint holds."""
    stored = set() if folder is None else {key for key in folder.tensors if key.startswith(_WEIGHT)}
    return {*checkpoint["state_dict"], *checkpoint.get("tied", ()), *(key.removeprefix(_WEIGHT) for key in stored)}


def read_weights(
    module: Any, checkpoint: Mapping[str, Any], folder: ShardedFolder | None, where: str, *, strict: bool = True
) -> None:
    """Reads an open checkpoint's weights into a module; all processes call this for a sharded one.

    Args:
        module: The module.
        checkpoint: Its `state_dict` holds whole tensors, or those that the module put back.
        folder: Where the others are; None: there are none.
        where: What the checkpoint is called in an error.
        strict: Whether every weight must be in the checkpoint.

    Raises:
        RuntimeError: If the checkpoint holds what the module lacks, or the reverse where `strict`; nothing is read.
        CheckpointError: If a file is damaged, or a weight has another shape.
    """
    own, given, found = own_state(module), checkpoint["state_dict"], weight_names(checkpoint, folder)
    check_keys(own, found if strict else found | {*own}, where, module)
    if folder is None and not sharded_parts(module):
        module.load_state_dict({**own, **given})
        return
    others = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    for name in given.keys() - others.keys():
        fill(own[name], given[name])
    if folder is not None:
        stored = {f"{_WEIGHT}{name}": own[name] for name in own if name not in given}
        wanted = {key: value for key, value in stored.items() if key in folder.tensors}
        folder.read_into(wanted, together=bool(sharded_parts(module)))
    if others:  # what some layers keep beside their weights
        module.load_state_dict({**own, **others})


def load_module(module_class: type[Any], path: Path) -> Any:
    """A module on the CPU with the hyperparameters and weights of a checkpoint.

    Args:
        module_class: A `LightningModule`.
        path: The file, or the folder of a sharded one.

    Raises:
        TypeError, RuntimeError: The checkpoint is another class's.
        CheckpointError: As `read_weights`.
    """
    if not is_checkpoint_folder(path):
        return module_class.load_from_checkpoint(path, map_location="cpu")
    checkpoint, folder = open_checkpoint(path)
    stream = io.BytesIO()  # Lightning takes a file, of which only the weights are missing
    torch.save(checkpoint, stream)
    stream.seek(0)
    with warnings.catch_warnings():
        for message in ("Found keys that are in the model state dict but not in", "The state dict in .* contains no"):
            warnings.filterwarnings("ignore", message=message)
        module = module_class.load_from_checkpoint(stream, map_location="cpu", strict=False)
    own = own_state(module)
    left_out = checkpoint.get(ENTRY, {}).get("left_out", ())
    back = {name: own[name] for name in left_out if name in own}
    read_weights(module, {**checkpoint, "state_dict": checkpoint["state_dict"] | back}, folder, f"checkpoint {path!s}")
    return module


def _on_disk(path: _PATH) -> Path:
    """A path on this machine.

    Raises:
        OSError: It is a remote one.
    """
    found = local_path(path)
    if found is None:
        raise OSError(
            f"cannot write checkpoint {str(path)!r}: a sharded checkpoint is a folder on a disk that all processes "
            "share; save_distributed_checkpoint=False writes a single file, also a remote one"
        )
    return found
