"""What tells one source from another: a file's place, size and time, or a hash of rows that are in no file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def identity_of_file(path: Path) -> list[str | int]:
    """A file's whole path, its size in bytes, and the time of its last change in nanoseconds."""
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def identity_of_folder(path: Path) -> list[list[str | int]]:
    """That of all files in a folder and below, in order."""
    return [identity_of_file(file) for file in sorted(path.rglob("*")) if file.is_file()]


def content_of(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """A hash of rows; None where one cannot be read or holds anything but data, which has no content to compare.

    Args:
        rows: They are read once.
    """
    total = hashlib.sha256()
    try:
        for row in rows:
            total.update(json.dumps(row, default=_plain).encode())
            total.update(b"\n")
    except (TypeError, ValueError, RecursionError):
        return None
    return total.hexdigest()


def content_of_dataset(dataset: Any) -> Any:
    """A hash of a `datasets.Dataset`, with what its rows are given as; None where a function of the user's makes them.

    Args:
        dataset: It is read once, in Arrow's own form.
    """
    import pyarrow

    form = dataset.format
    if form["type"] == "custom":
        return None
    total = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        total.update(sink.getvalue())
    return [total.hexdigest(), form["type"], sorted(form["columns"]), repr(form["format_kwargs"])]


def _plain(value: Any) -> Any:
    """Data that JSON does not know, with its type, so that 1 and a number of numpy's that is 1 are two things."""
    if isinstance(value, Mapping):
        return dict(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "tolist"):  # an array, a tensor or one of their numbers
        return [kind, str(value.dtype), value.tolist()]
    if hasattr(value, "isoformat"):  # a date or a time
        return [kind, value.isoformat()]
    if isinstance(value, bytes):
        return [kind, value.hex()]
    raise TypeError(f"{kind} is no data")
