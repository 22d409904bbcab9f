"""Whole rows from shares: how many rows of each source stand in each batch, so that none strays from its share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def whole_shares(values: Sequence[float | Fraction]) -> list[int]:
    """Whole numbers in the same ratio, exactly as the numbers are written.

    Args:
        values: Positive numbers.

    >>> whole_shares([0.7, 0.2, 0.1]), whole_shares([2, 2])
    ([7, 2, 1], [1, 1])
    """
    exact = [value if isinstance(value, Fraction) else Fraction(repr(float(value))) for value in values]
    unit = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * unit) for share in exact]
    divisor = math.gcd(*whole)
    return [share // divisor for share in whole]


def tempered(values: Sequence[float], temperature: float) -> list[float]:
    """Shares proportional to `value ** (1 / temperature)` (arXiv:1910.10683, section 3.5.2), the largest as 1.

    Args:
        values: Positive numbers, such as the rows of each source.
        temperature: At 1 the shares are those of `values`; the higher, the more equal they are.
    """
    greatest = max(values)
    return [(value / greatest) ** (1 / temperature) for value in values]


def apportion(shares: Sequence[int], counts: Sequence[int], total: int) -> list[int]:
    """How many rows each source has among the first `total`, where it had `counts` among fewer.

    Row j of a source (from 1) is due when the source's exact share reaches j, and may not come before it exceeds j - 1.
    Of the rows that may come the earliest due ones are taken. At unit shares this is the chairman assignment problem
    (R. Tijdeman, Discrete Mathematics 32, 1980); that batches can always be filled so follows from Hall's theorem, as
    no stretch of batches has more rows that must fall into it than places.

    Args:
        shares: Whole numbers; each source is to have its part of their sum.
        counts: What an earlier call gave, or zeros.
        total: At least the sum of `counts`.

    Returns:
        Counts that sum to `total`, none below what it was, each less than one row from its exact share.

    >>> apportion([1, 1, 2], [0, 0, 0], 3), apportion([1, 1, 2], [1, 1, 1], 4)
    ([1, 1, 1], [1, 1, 2])
    """
    whole = sum(shares)
    found = [max(count, total * share // whole) for count, share in zip(counts, shares, strict=True)]
    free = total - sum(found)
    if free:
        early = [n for n, share in enumerate(shares) if found[n] * whole < total * share]
        early.sort(key=lambda n: Fraction(found[n] + 1, shares[n]))
        for number in early[:free]:
            found[number] += 1
    return found
