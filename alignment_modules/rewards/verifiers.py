"""Rewards that a program can check; each also serves as an evaluation metric, as the share of right answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from alignment_modules.functional.http import short
from alignment_modules.functional.ranges import Count, NonNegative, check_options
from alignment_modules.rewards.number_text import exact_number, is_missing, last_number, tail, within
from alignment_modules.rewards.patterns import TimedPattern
from alignment_modules.rewards.protocol import RewardError

__all__ = ["ExactMatch", "NumericAnswer", "RegexMatch", "SoftOverlong", "last_number"]

TAIL_CHARACTERS = 8192
"""How much of a completion's end `NumericAnswer` reads."""


def _column(name: str, columns: dict[str, Any]) -> Sequence[Any]:
    if name not in columns:
        found = ", ".join(sorted(columns)) or "none"
        raise RewardError(f"column={name!r} is not in the data; found: {found}")
    return columns[name]


def _extracted(text: str, pattern: TimedPattern | None) -> str | None:
    """The last match's first group (or the whole match); the text itself without a pattern; None without a match."""
    return text if pattern is None else pattern.last(text)


class ExactMatch:
    """1 where the completion is the answer, else 0; not applicable where the answer is None or NaN.

    Args:
        column: The data set's column with the answer; an entry may be a list of accepted answers.
        strip: Whether white space at both ends is ignored.
        ignore_case: Whether case is ignored.
        extract: A regular expression; its last match in the completion (its first group, if it has one) is compared.
            A completion on which it takes more than half a second has no match.

    Raises:
        ValueError: If `extract` is not a regular expression.

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
        self.extract = None if extract is None else TimedPattern(extract, "extract")

    @property
    def required_columns(self) -> tuple[str, ...]:
        """What the data must have."""
        return (self.column,)

    def _normal(self, text: Any) -> str:
        text = str(exact_number(text)) if type(text) is int else str(text)
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
            if is_missing(answer):
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
        pattern: The regular expression; flags go inside, e.g. "(?s)". A completion on which it takes more than half a
            second does not match; `[^<]*+` instead of `.*` between tags cannot take long.
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
        self.pattern = TimedPattern(pattern, "pattern")
        self.full = full

    def __call__(self, completions: list[str]) -> list[float]:
        """Matches each completion.

        Args:
            completions: N texts.

        Returns:
            N times 1 or 0.
        """
        return [float(self.pattern.matches(completion, full=self.full)) for completion in completions]


class NumericAnswer:
    """1 where the completion's last number equals the answer, else 0; not applicable where the answer is None or NaN.

    Understands signs, thousands commas, decimals, exponents of up to three digits and simple fractions; compares in
    decimal arithmetic, so long integers are not rounded. Of a textual
    answer the last number counts too ("... #### 72"). Only the last 8,192 characters of a completion (of what `extract`
    finds) are read.

    Args:
        column: The data set's column with the answer, a number or a text with one.
        tolerance: Largest absolute difference that still counts.
        extract: A regular expression; the number is looked for in its last match (its first group, if it has one). A
            completion on which it takes more than half a second has no match.

    Raises:
        ValueError: If `tolerance` is negative or not finite, or `extract` is not a regular expression.

    Examples:
        >>> NumericAnswer(tolerance=0.01)(completions=["so it is 1,000.", "x = 3", "?"], answer=[1000, "2.5", 1])
        [1.0, 0.0, 0.0]
    """

    name = "numeric_answer"

    def __init__(self, column: str = "answer", tolerance: NonNegative = 0.0, extract: str | None = None) -> None:
        check_options(NumericAnswer.__init__, locals())
        self.column = column
        self.tolerance = tolerance
        self.extract = None if extract is None else TimedPattern(extract, "extract")

    @property
    def required_columns(self) -> tuple[str, ...]:
        """What the data must have."""
        return (self.column,)

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
            if is_missing(answer):
                scores.append(None)
                continue
            expected = exact_number(answer)
            if expected is None:
                raise RewardError(f"column {self.column!r} holds no number in row {row}: {short(answer)}")
            found = last_number(tail(_extracted(completion, self.extract) or "", TAIL_CHARACTERS))
            scores.append(float(found is not None and within(found, expected, self.tolerance)))
        return scores


class SoftOverlong:
    """A penalty that grows from 0 to -1 as a completion nears its limit (DAPO, arXiv:2503.14476, equation 13).

    With length y: 0 up to `max_length - buffer`, then `((max_length - buffer) - y) / buffer`, -1 beyond `max_length`.
    Beside a reward from 0 to 1 it counts as much as the answer; `reward_weights` says otherwise.

    Args:
        max_length: Tokens of a completion from which the penalty is -1; None: the longest that is sampled, the module's
            `max_completion_length`, or a row's own limit where it has one.
        buffer: Tokens before `max_length` over which the penalty grows; None: a fifth of it, as in the paper.

    Raises:
        ValueError: If `buffer` is not within [1, max_length].

    Examples:
        >>> SoftOverlong(max_length=10, buffer=4)(completion_ids=[[1] * 6, [1] * 8, [1] * 12])
        [0.0, -0.5, -1.0]
    """

    name = "soft_overlong"

    def __init__(self, max_length: Count | None = None, buffer: Count | None = None) -> None:
        check_options(SoftOverlong.__init__, locals())
        self._given = (max_length, buffer)
        self.max_length: int | None = None
        self.buffer: int | None = None
        if max_length is not None:
            self._settle(max_length)

    def limit_to(self, max_completion_length: int) -> None:
        """Takes the longest completion that is sampled, where no `max_length` was given.

        Args:
            max_completion_length: In tokens.

        Raises:
            ValueError: If `buffer` is more.
        """
        if self._given[0] is None:
            self._settle(max_completion_length)

    def _settle(self, max_length: int) -> None:
        buffer = max(max_length // 5, 1) if self._given[1] is None else self._given[1]
        if buffer > max_length:
            raise ValueError(f"buffer={buffer} must lie within [1, max_length={max_length}]")
        self.max_length, self.buffer = max_length, buffer

    def __call__(
        self, completion_ids: list[Sequence[int]], completion_limits: list[int | None] | None = None
    ) -> list[float]:
        """Judges each completion by its number of tokens.

        Args:
            completion_ids: N lists of token ids, without padding.
            completion_limits: N longest completions of rows with a limit of their own, which then takes the place of
                that of all, with as large a share of it to ramp over; not read where a `max_length` was given.

        Returns:
            N numbers within [-1, 0].

        Raises:
            RewardError: If no `max_length` was given, and nobody has told the longest completion.
        """
        if self.max_length is None or self.buffer is None:
            raise RewardError("max_length=None: the longest completion is known to a module alone; give max_length")
        limits = completion_limits if completion_limits is not None and self._given[0] is None else []
        return [self._of(len(ids), limit) for ids, limit in zip_longest(completion_ids, limits)]

    def _of(self, length: int, limit: int | None) -> float:
        """What a completion gets whose limit is this; None: that of all."""
        longest, buffer = self.max_length or 1, self.buffer or 1
        if limit is not None and limit < longest:
            longest, buffer = limit, max(buffer * limit // longest, 1)
        return max(-1.0, min(0.0, (longest - buffer - length) / buffer))
