"""Plans: how the rows of a table are cut into batches, the same way in every epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A bucket spans lengths from this share of its longest row on, and more where it would have fewer batches than this.
_SPAN = 0.9
_FEWEST = 2


@dataclass(frozen=True)
class Plan:
    """Rows in an order, of which neighbours of one class may change places, and how they are cut into global batches.

    Attributes:
        rows: Row numbers, int64 `[rows]`.
        classes: The class of each, int64 `[rows]`, not decreasing.
        sizes: Rows of each global batch, int64 `[batches]`; together at most all rows.
    """

    rows: np.ndarray
    classes: np.ndarray
    sizes: np.ndarray


def bucketed(lengths: np.ndarray, max_tokens: int, num_replicas: int = 1) -> Plan:
    """Rows of similar length in one class, cut into batches of at most `max_tokens` padded tokens a rank.

    The longest row of a class says how many rows a batch of it has, so that any of its rows may be in any of its
    batches. A class goes down to nine tenths of its longest row, further where it would have fewer than two batches,
    and on to the end of a batch: all batches but the last, of the shortest rows, are full.

    Args:
        lengths: Tokens of each row, int64 `[rows]`, at most `max_tokens`.
        max_tokens: Most padded tokens, rows times the longest, of a batch of one rank.
        num_replicas: Number of ranks.

    >>> bucketed(np.array([2, 8, 2, 9, 2]), 9).sizes
    array([1, 1, 3])
    """
    rows = np.argsort(-lengths, kind="stable")
    descending, classes, sizes = lengths[rows], np.empty(len(rows), dtype=np.int64), list[int]()
    start = number = 0
    while start < len(rows):
        longest = int(descending[start])
        size = max_tokens // longest * num_replicas
        near = int(np.searchsorted(-descending, -_SPAN * longest, side="right")) - start
        batches = max(_FEWEST, -(-near // size))
        stop = min(start + batches * size, len(rows))
        sizes += [size] * ((stop - start) // size)
        classes[start:stop] = number
        sizes += [(stop - start) % size] * (stop == len(rows) and (stop - start) % size > 0)
        start, number = stop, number + 1
    return Plan(rows, classes, np.asarray(sizes, dtype=np.int64))


def ascending(
    values: np.ndarray, lengths: np.ndarray, max_tokens: int | None, batch_size: int, num_replicas: int = 1
) -> Plan:
    """Rows by rising values, those of equal value in one class; with a budget also by rising length among these.

    Args:
        values: One a row, float64 `[rows]`.
        lengths: Tokens of each row, int64 `[rows]`, at most `max_tokens`.
        max_tokens: Most padded tokens of a batch of one rank; None: batches have `batch_size` rows.
        batch_size: Rows of a batch of one rank, where there is no budget.
        num_replicas: Number of ranks.

    >>> ascending(np.array([3.0, 1.0, 3.0]), np.array([1, 1, 1]), None, 2).rows
    array([1, 0, 2])
    """
    keys = (values,) if max_tokens is None else (lengths, values)
    rows = np.lexsort(keys)
    steps = [np.diff(key[rows], prepend=key[rows[:1]]) != 0 for key in keys]
    classes = np.cumsum(np.any(steps, axis=0))
    if max_tokens is not None:
        return Plan(rows, classes, _filled(lengths[rows], max_tokens, num_replicas))
    step = batch_size * num_replicas
    sizes = [step] * (len(rows) // step) + [len(rows) % step] * (len(rows) % step > 0)
    return Plan(rows, classes, np.asarray(sizes, dtype=np.int64))


def _filled(lengths: np.ndarray, max_tokens: int, num_replicas: int) -> np.ndarray:
    """Sizes of batches of rows one after the other, each as many as the budget holds."""
    sizes, size, longest = list[int](), 0, 0
    for length in lengths.tolist():
        widest = max(longest, length)
        if size and -(-(size + 1) // num_replicas) * widest > max_tokens:
            sizes.append(size)
            size, widest = 0, length
        size, longest = size + 1, widest
    return np.asarray([*sizes, size] if size else sizes, dtype=np.int64)
