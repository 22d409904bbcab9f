"""Addition problems: which split each belongs to, how they are drawn, and how a careless writer answers them.

Numbers are written with their units first and a fixed number of digits, as one adds by hand: 347 + 586 = 933 is
"743+685=3390". A model that reads and writes digits in this order needs to look only a fixed distance back.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np

from datamodules.ranges import Count, Range, Seed, Share, check_options

Split = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = ("train", "validation", "test")
MAX_DIGITS = 8
Digits = Annotated[int, Range(1, MAX_DIGITS)]
# Of 20 cells of the hash: test 2, validation 1, train the rest.
_CELLS = 20
_KEY = 0x9E3779B97F4A7C15
_ROUNDS = 200


def split_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Number in `SPLITS` of each problem's split: 85 % train, 5 % validation, 10 % test.

    It depends on the two numbers alone, in either order, and on no seed: whatever is drawn from two splits is disjoint.

    Args:
        first: First summands [n], integers from 0 up.
        second: Second summands [n].

    Returns:
        int64 [n].
    """
    low, high = np.minimum(first, second), np.maximum(first, second)
    key = low.astype(np.uint64) * np.uint64(10**MAX_DIGITS) + high.astype(np.uint64)
    cell = (_mix(key) % np.uint64(_CELLS)).astype(np.int64)
    return np.where(cell < 2, SPLITS.index("test"), np.where(cell == 2, SPLITS.index("validation"), 0))


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014), keyed."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(_KEY)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def draw_problems(
    *, split: Split, size: Count, seed: Seed, digits: Digits, short: bool, distinct: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draws problems of one split.

    Args:
        split: "train", "validation" or "test".
        size: How many.
        seed: Seed of the draw.
        digits: Most digits of a number, 1 to 8.
        short: Draw how many digits a number has first, evenly from 1 to `digits`, so that small numbers are common;
            else all numbers below `10**digits` are equally likely.
        distinct: Each problem at most once, in either order of its summands.

    Returns:
        Both summands, int64 [size] each.

    Raises:
        ValueError: An argument is out of range, or the split has fewer than `size` distinct problems.
    """
    check_options(draw_problems, locals())
    rng = np.random.default_rng([seed, SPLITS.index(split), digits])
    found = np.zeros((0, 2), dtype=np.int64)
    for _ in range(_ROUNDS):
        pairs = rng.integers(0, 10**digits, (2 * size + 64, 2))
        if short:
            pairs %= 10 ** rng.integers(1, digits + 1, pairs.shape)
        pairs = pairs[split_of(pairs[:, 0], pairs[:, 1]) == SPLITS.index(split)]
        found = np.concatenate((found, pairs))
        if distinct:
            _, places = np.unique(np.sort(found, axis=1), axis=0, return_index=True)
            found = found[np.sort(places)]
        if len(found) >= size:
            return found[:size, 0], found[:size, 1]
    raise ValueError(
        f"size={size}: the {split} split of numbers of {digits} digits has about {len(found)} distinct problems; "
        "take fewer or more digits"
    )


def slip_rates(carelessness: float) -> np.ndarray:
    """How often the writer forgets the carry that comes into a column, by the column's lower digit: [10].

    The larger the lower digit, the more often: from 0.185 to 0.815, times `carelessness`. Up to 4 the carry is usually
    added, from 5 on it is usually forgotten. So the likeliest answer is right for about half of the problems, and a
    right answer stays likely enough to be sampled for nearly all.

    Args:
        carelessness: 0 never slips, 1 slips at these rates.
    """
    return carelessness * (0.185 + 0.07 * np.arange(10))


def write_sums(
    first: np.ndarray, second: np.ndarray, *, digits: Digits, carelessness: Share = 0.0, seed: Seed = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Adds column by column, as a writer does who sometimes forgets a carry.

    Args:
        first: First summands [n].
        second: Second summands [n].
        digits: Digits of a summand; a sum has one more.
        carelessness: Factor on `slip_rates`, from 0 (always right) to 1.
        seed: Seed of the slips.

    Returns:
        The sums as written, int64 [n], and whether each is right, bool [n].

    Raises:
        ValueError: `carelessness` is out of range.
    """
    check_options(write_sums, locals())
    rng = np.random.default_rng([seed, digits, 1])
    rates = slip_rates(carelessness)
    carry = np.zeros(len(first), dtype=np.int64)
    written = np.zeros(len(first), dtype=np.int64)
    for column in range(digits):
        upper, lower = first // 10**column % 10, second // 10**column % 10
        carry *= rng.random(len(first)) >= rates[lower]
        total = upper + lower + carry
        written += total % 10 * 10**column
        carry = total // 10
    written += carry * 10**digits
    return written, written == first + second


def units_first(number: int, width: int) -> str:
    """A number with its units first, filled with zeros.

    >>> units_first(347, 4)
    '7430'
    """
    return f"{number:0{width}d}"[::-1]
