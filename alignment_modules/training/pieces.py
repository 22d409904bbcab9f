"""A batch of rows, cut into micro-batches; what stands in where a rank has fewer than the others."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

SEGMENTS = "segments"  # built from a whole batch, so that no part of it has them


def cut(batch: Mapping[str, Any], size: int | None) -> list[dict[str, Any]]:
    """Cuts a batch into pieces of at most `size` rows, in order.

    Tensors and lists are cut along their first dimension; numbers, strings and the like go to every piece. Segments are
    not carried: a piece that is not the whole batch builds its own.

    Args:
        batch: A dictionary of row tensors `[rows, ...]` and lists of `rows` entries.
        size: Rows of a piece; None: all.

    Returns:
        The pieces; none of a batch without rows.

    Raises:
        ValueError: If two entries have another number of rows, or none has rows.

    Example:
        >>> cut({"x": [1, 2, 3], "name": "a"}, 2)
        [{'x': [1, 2], 'name': 'a'}, {'x': [3], 'name': 'a'}]
    """
    rows = _rows(batch)
    if size is None or size >= rows:
        return [dict(batch)] if rows else []
    return [_select(batch, slice(start, start + size)) for start in range(0, rows, size)]


def empty_like(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without a row.

    Args:
        batch: A dictionary of row tensors and lists.
    """
    return _select(batch, slice(0, 0))


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)


def _select(batch: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value[rows] if _has_rows(value) else value for name, value in batch.items() if name != SEGMENTS}


def _rows(batch: Mapping[str, Any]) -> int:
    lengths = {name: len(value) for name, value in batch.items() if name != SEGMENTS and _has_rows(value)}
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"a batch that is cut into micro-batches needs entries of one number of rows; found: {found}")
    return next(iter(lengths.values()))
