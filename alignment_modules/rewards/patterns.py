"""A user's regular expression with a limit on its time: some take longer than a lifetime on what a policy may write."""

from __future__ import annotations

import logging
from collections import deque

import regex

_log = logging.getLogger(__name__)

TIME_LIMIT = 0.5
"""Seconds of computing that a pattern may take on one text; ordinary ones take milliseconds."""


class TimedPattern:
    """A regular expression that gives up after `TIME_LIMIT` seconds; a text it gave up on does not match.

    Not to match rather than not to apply: a policy must not escape its judge by what it writes.

    Args:
        pattern: The expression, in the syntax of Python's `re`.
        argument: The option's name, for the message.

    Raises:
        ValueError: If it is not a regular expression.
    """

    def __init__(self, pattern: str, argument: str) -> None:
        try:
            self._compiled = regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"{argument}={pattern!r} is not a regular expression: {error}") from error
        self.pattern = pattern
        self._warned = False

    def matches(self, text: str, *, full: bool = False) -> bool:
        """Whether the text holds a match, or with `full` is one."""
        match = self._compiled.fullmatch if full else self._compiled.search
        try:
            return match(text, timeout=TIME_LIMIT) is not None
        except TimeoutError:
            self._warn(text)
            return False

    def last(self, text: str) -> str | None:
        """The last match's first group, or the whole match where there is none; None without a match."""
        try:
            matches = deque(self._compiled.finditer(text, timeout=TIME_LIMIT), maxlen=1)
        except TimeoutError:
            self._warn(text)
            return None
        if not matches:
            return None
        return matches[0].group(1 if self._compiled.groups else 0)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "the pattern %r took more than %g seconds on a completion of %d characters, which counts as no match "
                "(said once); write it so that it cannot try one place in many ways, e.g. [^<]*+ instead of .*",
                self.pattern,
                TIME_LIMIT,
                len(text),
            )
