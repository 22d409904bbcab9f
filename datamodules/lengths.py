"""How long rows are, compared with what a table's rows may hold."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class HowLong(NamedTuple):
    """What is known of rows' lengths, in tokens.

    Attributes:
        rows: How many rows there are.
        too_long: How many have too many tokens.
        most: The length that 95 of 100 do not exceed.
        longest: The greatest length.
    """

    rows: int
    too_long: int
    most: int
    longest: int


def how_long(lengths: np.ndarray, max_length: int) -> HowLong:
    """Of rows with the lengths `[rows]`, in tokens."""
    if len(lengths) == 0:
        return HowLong(0, 0, 0, 0)
    most = int(np.quantile(lengths, 0.95, method="higher"))
    return HowLong(len(lengths), int((lengths > max_length).sum()), most, int(lengths.max()))


def too_long_warning(split: str, max_length: int, found: HowLong) -> str:
    """A warning that names a fitting length where more than half of the rows are too long, else nothing.

    >>> too_long_warning("train", 4, HowLong(10, 6, 8, 9))
    'train: 6 of 10 rows are longer than max_length=4; max_length=8 holds 95 of 100, max_length=9 all'
    """
    if found.too_long * 2 <= found.rows:
        return ""
    return (
        f"{split}: {found.too_long} of {found.rows} rows are longer than max_length={max_length}; "
        f"max_length={found.most} holds 95 of 100, max_length={found.longest} all"
    )
