"""Rewards that a program can check; each also serves as an evaluation metric, as the share of right answers."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from decimal import Decimal, DivisionByZero, InvalidOperation, localcontext
from typing import Any

from alignment_modules.functional.ranges import Count, NonNegative, check_options
from alignment_modules.rewards.protocol import RewardError

# a sign counts only where it does not follow a number or a word: "7-3" ends in 3; exponents are short on purpose
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?(?:/\d+)?"
)


_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")


def _plain(text: str) -> str:
    """The text with LaTeX's fractions and separators and the typographic minus written in plain characters."""
    return _FRACTION.sub(r"\1/\2", text.replace("\N{MINUS SIGN}", "-")).replace("{,}", ",")


def _column(name: str, columns: dict[str, Any]) -> Sequence[Any]:
    if name not in columns:
        found = ", ".join(sorted(columns)) or "none"
        raise RewardError(f"column={name!r} is not in the data; found: {found}")
    return columns[name]


def _compile(pattern: str, argument: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}={pattern!r} is not a regular expression: {error}") from error


def _extracted(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """The last match's first group (or the whole match); the text itself without a pattern; None without a match."""
    if pattern is None:
        return text
    matches = deque(pattern.finditer(text), maxlen=1)
    if not matches:
        return None
    last = matches[0]
    return last.group(1) if pattern.groups else last.group(0)


class ExactMatch:
    """1 where the completion is the answer, else 0; not applicable where the answer is None.

    Args:
        column: The data set's column with the answer; an entry may be a list of accepted answers.
        strip: Whether white space at both ends is ignored.
        ignore_case: Whether case is ignored.
        extract: A regular expression; its last match in the completion (its first group, if it has one) is compared.

    Examples:
        >>> ExactMatch()(completions=[" 4", "5"], answer=["4", "4"])
        [1.0, 0.0]
    """

    name = "exact_match"

    def __init__(
        self, column: str = "answer", strip: bool = True, ignore_case: bool = False, extract: str | None = None
    ) -> None:
        check_options(ExactMatch.__init__, locals())
        self.column = column
        self.strip = strip
        self.ignore_case = ignore_case
        self.extract = None if extract is None else _compile(extract, "extract")

    def _normal(self, text: Any) -> str:
        text = str(text)
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        """Compares each completion with its answer.

        Args:
            completions: N texts.
            **columns: The data set's columns, of N entries each.

        Returns:
            N times 1, 0 or None.

        Raises:
            RewardError: If the column is missing.
        """
        scores: list[float | None] = []
        for completion, answer in zip(completions, _column(self.column, columns), strict=True):
            if answer is None:
                scores.append(None)
                continue
            found = _extracted(completion, self.extract)
            accepted = answer if isinstance(answer, list | tuple) else [answer]
            hit = found is not None and self._normal(found) in {self._normal(entry) for entry in accepted}
            scores.append(float(hit))
        return scores


class RegexMatch:
    """1 where the completion matches a regular expression, else 0: a reward for the format.

    Args:
        pattern: The regular expression; flags go inside, e.g. "(?s)".
        full: Whether the whole completion must match; else a match anywhere counts.

    Raises:
        ValueError: If `pattern` is not a regular expression.

    Examples:
        >>> RegexMatch(r"<think>.*</think>")(completions=["<think>a</think> 4", "4"])
        [1.0, 0.0]
    """

    name = "regex_match"

    def __init__(self, pattern: str, full: bool = False) -> None:
        check_options(RegexMatch.__init__, locals())
        self.pattern = _compile(pattern, "pattern")
        self.full = full

    def __call__(self, completions: list[str]) -> list[float]:
        """Matches each completion.

        Args:
            completions: N texts.

        Returns:
            N times 1 or 0.
        """
        match = self.pattern.fullmatch if self.full else self.pattern.search
        return [float(match(completion) is not None) for completion in completions]


class NumericAnswer:
    """1 where the completion's last number equals the answer, else 0; not applicable where the answer is None.

    Understands signs, thousands commas, decimals, exponents and simple fractions; compares in decimal arithmetic, so
    long integers are not rounded. Of a textual answer the last number counts too ("... #### 72").

    Args:
        column: The data set's column with the answer, a number or a text with one.
        tolerance: Largest absolute difference that still counts.
        extract: A regular expression; the number is looked for in its last match (its first group, if it has one).

    Raises:
        ValueError: If `tolerance` is negative or not finite.

    Examples:
        >>> NumericAnswer(tolerance=0.01)(completions=["so it is 1,000.", "x = 3", "?"], answer=[1000, "2.5", 1])
        [1.0, 0.0, 0.0]
    """

    name = "numeric_answer"

    def __init__(self, column: str = "answer", tolerance: NonNegative = 0.0, extract: str | None = None) -> None:
        check_options(NumericAnswer.__init__, locals())
        self.column = column
        self.tolerance = tolerance
        self.extract = None if extract is None else _compile(extract, "extract")

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        """Compares each completion's last number with its answer.

        Args:
            completions: N texts.
            **columns: The data set's columns, of N entries each.

        Returns:
            N times 1, 0 or None.

        Raises:
            RewardError: If the column is missing, or an answer holds no number.
        """
        scores: list[float | None] = []
        for row, (completion, answer) in enumerate(zip(completions, _column(self.column, columns), strict=True)):
            if answer is None:
                scores.append(None)
                continue
            expected = last_number(str(answer))
            if expected is None:
                raise RewardError(f"column {self.column!r} holds no number in row {row}: {answer!r}")
            found = last_number(_extracted(completion, self.extract) or "")
            scores.append(float(found is not None and self._equal(found, expected)))
        return scores

    def _equal(self, found: Decimal, expected: Decimal) -> bool:
        if found == expected:
            return True
        with localcontext() as context:
            context.prec = 60
            return abs(found - expected) <= Decimal(str(self.tolerance))


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
    numerator, _, denominator = matches[0].group().replace(",", "").partition("/")
    try:
        number = Decimal(numerator)
        return number / Decimal(denominator) if denominator else number
    except (DivisionByZero, InvalidOperation):
        return None


class SoftOverlong:
    """A penalty that grows from 0 to -1 as a completion nears its limit (DAPO, arXiv:2503.14476, equation 13).

    With length y: 0 up to `max_length - buffer`, then `((max_length - buffer) - y) / buffer`, -1 beyond `max_length`.

    Args:
        max_length: Tokens of a completion from which the penalty is -1.
        buffer: Tokens before `max_length` over which the penalty grows.

    Raises:
        ValueError: If `buffer` is not within [1, max_length].

    Examples:
        >>> SoftOverlong(max_length=10, buffer=4)(completion_ids=[[1] * 6, [1] * 8, [1] * 12])
        [0.0, -0.5, -1.0]
    """

    name = "soft_overlong"

    def __init__(self, max_length: Count, buffer: Count) -> None:
        check_options(SoftOverlong.__init__, locals())
        if buffer > max_length:
            raise ValueError(f"buffer={buffer} must lie within [1, max_length={max_length}]")
        self.max_length = max_length
        self.buffer = buffer

    def __call__(self, completion_ids: list[Sequence[int]]) -> list[float]:
        """Judges each completion by its number of tokens.

        Args:
            completion_ids: N lists of token ids, without padding.

        Returns:
            N numbers within [-1, 0].
        """
        start = self.max_length - self.buffer
        return [max(-1.0, min(0.0, (start - len(ids)) / self.buffer)) for ids in completion_ids]
