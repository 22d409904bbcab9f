"""One row, one line of JSON."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def to_json_line(row: dict[str, Any]) -> str:
    r"""A row as one line of strict JSON, with its line break.

    Tensors and arrays become lists; NaN and infinities, which JSON lacks, become null; other objects become text.

    Args:
        row: The row; keys are text.

    Returns:
        The line.

    Examples:
        >>> to_json_line({"text": "é", "reward": float("nan")})
        '{"text": "é", "reward": null}\n'
    """
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets errors of writing say which file it was; the operating system's own often do not.

    Args:
        path: The file that is written to.

    Raises:
        OSError: If it cannot be.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # a lone surrogate could not be written
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    return str(value)
