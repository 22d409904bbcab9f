"""Checkpoints in a folder to which each process writes its own part (torch.distributed.checkpoint).

The tensors are torch's files, of which any number of processes reads what it needs; `meta.pt` is the rest, and is
written last. Neither can run code when it is read.
"""

import contextlib
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    FileSystemReader,
    FileSystemWriter,
    Metadata,
    TensorStorageMetadata,
    load,
    save,
)

from alignment_modules.training.checkpoint_files import (
    CheckpointError,
    cannot_write,
    diagnosis,
    make_room,
    sync_folder,
    temporary_name,
)

META = "meta.pt"
_INDEX = ".metadata"
# What torch's index of the tensors is made of.
_INDEX_TYPES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


def is_checkpoint_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a checkpoint in a folder, whole or not."""
    return any((Path(path) / name).is_file() for name in (META, _INDEX))


class ShardedFolder:
    """A checkpoint in a folder.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read_rest(self) -> dict[str, Any]:
        """All but the tensors.

        Raises:
            CheckpointError: The folder is no whole checkpoint, or holds other Python objects.
        """
        self._check_whole()
        file = self.path / META
        try:
            rest = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"checkpoint {str(self.path)!r}: {META} {diagnosis(file, error)}") from error
        if not isinstance(rest, dict) or "pytorch-lightning_version" not in rest:
            raise CheckpointError(f"checkpoint {str(self.path)!r}: {META} was written by no Trainer")
        return rest

    @cached_property
    def tensors(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and type of each tensor.

        Raises:
            CheckpointError: As `read_rest`.
        """
        self._check_whole()
        entries = _Reader(self.path).read_metadata().state_dict_metadata
        found = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        return {name: (entry.size, entry.properties.dtype) for name, entry in found.items()}

    def read_into(self, tensors: Mapping[str, Tensor], *, together: bool) -> None:
        """Reads tensors, each process the parts that it holds.

        Args:
            tensors: By name, plain or distributed; written to.
            together: Whether all processes of the default group call this, which read it in step; needed where some
                tensors are distributed.

        Raises:
            CheckpointError: A file is damaged, or a tensor is missing or has another shape.
        """
        with _quiet():
            try:
                load({**tensors}, storage_reader=_Reader(self.path), no_dist=not together)
            except CheckpointException as failed:
                cause = next(iter(failed.failures.values()))[0]
                raise CheckpointError(f"checkpoint {str(self.path)!r} cannot be read: {_first_line(cause)}") from cause

    def read_whole(self) -> dict[str, Tensor]:
        """All tensors, on the CPU of this process.

        Raises:
            CheckpointError: As `read_into`.
        """
        found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in self.tensors.items()}
        self.read_into(found, together=False)
        return found

    def _check_whole(self) -> None:
        missing = [name for name in (META, _INDEX) if not (self.path / name).is_file()]
        if missing:
            held = sorted(entry.name for entry in self.path.iterdir())[:8] if self.path.is_dir() else []
            raise CheckpointError(
                f"checkpoint {str(self.path)!r} lacks {missing[0]}: the folder is no checkpoint, or its write was "
                f"interrupted; use an earlier one. It holds {held}"
            )


def write_sharded(tensors: Mapping[str, Tensor], rest: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint; all processes of the default group call this.

    Everything goes to a folder beside the target, which takes its name once it is complete on disk. A former
    checkpoint of that name is moved aside under a name that ends in `.ckpt` as well, and removed at last, so that one
    of both is always there to resume from.

    Args:
        tensors: By name, plain (the same in all processes) or distributed.
        rest: Anything else; that of the first process counts.
        path: The folder; the same in all processes.

    Raises:
        OSError: It cannot be written; a former checkpoint is untouched.
    """
    first = torch.distributed.get_rank() == 0
    folder = Path(_of_first(lambda: _begin(path), path))
    try:
        try:
            save({**tensors}, storage_writer=FileSystemWriter(folder))
        except CheckpointException as failed:
            cause = next(iter(failed.failures.values()))[0]
            raise cannot_write(path, cause) from cause
        _of_first(lambda: _finish(rest, folder, path), path)
    except BaseException:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _begin(path: Path) -> str:
    make_room(path.parent)
    folder = temporary_name(path)
    shutil.rmtree(folder, ignore_errors=True)
    return str(folder)


def _finish(rest: Mapping[str, Any], folder: Path, path: Path) -> str:
    with open(folder / META, "wb") as file:
        torch.save({**rest}, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    former = path.with_name(f"{path.stem}.former.ckpt")
    if path.exists():
        shutil.rmtree(former, ignore_errors=True)
        path.rename(former)
    folder.rename(path)
    sync_folder(path.parent)
    if former.is_file():
        former.unlink()
    shutil.rmtree(former, ignore_errors=True)
    return ""


def _of_first(act: Callable[[], str], path: Path) -> str:
    """What the first process finds out or does, in all processes; where it fails, all raise."""
    found: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            found[0] = act()
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            found[1] = cannot_write(path, error)
    torch.distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return str(found[0])


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Takes a checkpoint apart into the tensors that belong to all processes, by name, and the rest.

    Args:
        checkpoint: As Lightning dumps it; `state_dict` holds a tensor under several keys where weights are tied.

    Returns:
        The tensors of `state_dict` and `optimizer_states`, and everything else; `read_as_file` puts them together.

    Raises:
        ValueError: An optimizer keeps state for a distributed weight that is not distributed with it.
    """
    tensors, first = {}, dict[int, str]()
    rest = {**checkpoint, "state_dict": {}, "tied": {}}
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(value, Tensor):
            rest["state_dict"][name] = value
        elif id(value) in first:
            rest["tied"][name] = first[id(value)]
        else:
            first[id(value)], tensors[f"state_dict.{name}"] = name, value
    if "optimizer_states" in checkpoint:
        rest["optimizer_states"] = []
    for number, saved in enumerate(checkpoint.get("optimizer_states", ())):
        plain: dict[Any, dict[str, Any]] = {}
        for index, entries in saved["state"].items():
            plain[index] = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
            found = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
            tensors |= {f"optimizer_states.{number}.{index}.{key}": value for key, value in found.items()}
        rest["optimizer_states"].append({**saved, "state": plain})
    return tensors, rest


def read_as_file(path: Path) -> dict[str, Any]:
    """A checkpoint in a folder, put together on the CPU of this process, as if it were a single file.

    Args:
        path: The folder.

    Raises:
        CheckpointError: As `ShardedFolder.read_into`.
    """
    folder = ShardedFolder(path)
    rest, tensors = folder.read_rest(), folder.read_whole()
    state = {name.removeprefix("state_dict."): t for name, t in tensors.items() if name.startswith("state_dict.")}
    for name, other in rest.pop("tied", {}).items():
        state[name] = state[other]
    for number, saved in enumerate(rest.get("optimizer_states", ())):
        prefix = f"optimizer_states.{number}."
        for name in [name for name in tensors if name.startswith(prefix)]:
            index, _, key = name.removeprefix(prefix).partition(".")
            saved["state"][int(index)][key] = tensors[name]
    return {**rest, "state_dict": rest.get("state_dict", {}) | state}


class _Reader(FileSystemReader):
    """Torch's own, but for its index, which it would let run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the tensors.

        Raises:
            CheckpointError: It is damaged, or holds other objects.
        """
        file = Path(self.path) / _INDEX
        try:
            with open(file, "rb") as stream:
                found = _IndexUnpickler(stream).load()
        except (pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError, AttributeError, IndexError) as error:
            what = str(error) if isinstance(error, _RefusedError) else f"{_INDEX} is damaged: {_first_line(error)}"
            raise CheckpointError(f"checkpoint {str(self.path)!r}: {what}") from error
        if not isinstance(found, Metadata):
            raise CheckpointError(f"checkpoint {str(self.path)!r}: {_INDEX} holds a {type(found).__name__}")
        return found


class _RefusedError(pickle.UnpicklingError):
    """The index names something that it cannot need."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_TYPES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise _RefusedError(f"{_INDEX} holds Python objects ({module}.{name}), which can run code when read: refused")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process reads alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
