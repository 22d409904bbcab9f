"""Numbers in texts, read in linear time and compared in decimal arithmetic."""

from __future__ import annotations

import math
import re
from collections import deque
from decimal import Context, Decimal
from typing import Any

# possessive throughout, so that no character is tried twice; a sign counts only where it does not follow a number or a
# word: "7-3" ends in 3; exponents are short on purpose
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)])[-+])?"
    r"(?:(?P<groups>\d++(?:,\d++)*+)(?P<decimals>\.\d++)?+|(?<!\d)(?P<bare>\.\d++))"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\d))?(?:/(?P<denominator>\d++))?+"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*+\{\s*+(\d++)\s*+\}\s*+\{\s*+(\d++)\s*+\}")
# contexts of their own, so that no setting of the program's changes a reward
_QUOTIENT = Context(prec=28, traps=[])
_DIFFERENCE = Context(prec=60, traps=[])


def last_number(text: str) -> Decimal | None:
    r"""The last number in a text.

    Args:
        text: Any text.

    Returns:
        The number, or None if there is none (or it is a fraction over 0).

    Examples:
        >>> last_number("2 + 2 = 4."), last_number("7-3"), last_number("-1,234.5"), last_number("3/4")
        (Decimal('4'), Decimal('3'), Decimal('-1234.5'), Decimal('0.75'))
        >>> last_number(r"so $x = -\frac{1}{2}$"), last_number("1{,}000")
        (Decimal('-0.5'), Decimal('1000'))
    """
    matches = deque(_NUMBER.finditer(_plain(text)), maxlen=1)
    if not matches:
        return None
    found = matches[0].groupdict(default="")
    groups = found["groups"].split(",")
    first = _thousands(groups)
    sign = found["sign"] if first == 0 else ""
    digits = "".join(groups[first:]) + found["decimals"] + found["bare"]
    number = Decimal(sign + digits + found["exponent"])
    if found["denominator"]:
        number = _QUOTIENT.divide(number, Decimal(found["denominator"]))
    return number if number.is_finite() else None


def exact_number(value: Any) -> Decimal | None:
    """A number as it is, or the last one of a text; None where there is none.

    Args:
        value: A number of any kind, or anything with a text.

    Returns:
        The number.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)  # Python does not write integers of more than 4300 digits as text
    return last_number(str(value))


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, or the NaN that tables put in place of it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def within(found: Decimal, expected: Decimal, tolerance: float) -> bool:
    """Whether two numbers differ by no more than `tolerance`."""
    if found == expected:
        return True
    return _DIFFERENCE.subtract(found, expected).copy_abs() <= Decimal(str(tolerance))


def tail(text: str, characters: int) -> str:
    """The end of a text; where it is cut, without what may be the rest of a number."""
    if len(text) <= characters:
        return text
    end = text[-characters:]
    return end[re.match(r"[\d.,eE/+-]*+", end).end() :]  # type: ignore[union-attr]


def _plain(text: str) -> str:
    """The text with LaTeX's fractions and separators and the typographic minus written in plain characters."""
    return _FRACTION.sub(r"\1/\2", text.replace("\N{MINUS SIGN}", "-")).replace("{,}", ",")


def _thousands(groups: list[str]) -> int:
    """Where in digits between commas the last number begins: "1,000" is one, "12,34" are two, "1,2,000" 1 and 2000."""
    first = len(groups) - 1
    while first > 0 and len(groups[first]) == 3 and len(groups[first - 1]) <= 3:
        first -= 1
    return first
