"""Arrays in files: written in pieces, mapped into memory, and sent to other processes by their path."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


class FileArray(np.ndarray):
    """An array mapped from a file; a process that it is sent to maps the same file."""

    path: str = ""  # of the whole array; a view of some of it has none

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (open_array, (self.path,)) if self.path else np.asarray(self).__reduce_ex__(protocol)


def open_array(path: str | Path) -> np.ndarray:
    """Maps a file that `write_array` wrote; read only.

    Raises:
        ValueError: The file holds no array, or less of it than it says.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{path}: an array of the format {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    if shape[0] == 0:
        return np.zeros(0, dtype)
    mapped = np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)).view(FileArray)
    mapped.path = str(path)
    return mapped


def write_array(path: Path, pieces: Iterable[np.ndarray], dtype: Any, length: int) -> None:
    """Writes the pieces of an array one after the other.

    Args:
        path: The file.
        pieces: Arrays `[length_i]` of the type.
        dtype: The type.
        length: The length of all together.
    """
    head = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (length,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype=dtype).view(np.uint8).data)


def file_checksum(path: Path) -> int:
    """The crc32 of a file's bytes, read in pieces."""
    total = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            total = zlib.crc32(piece, total)
    return total


def flush(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk, of a folder where the system can."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows flushes only what may be written
    except PermissionError:
        if folder:  # which Windows does not open
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
