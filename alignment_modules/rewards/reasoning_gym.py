"""Answers to problems of the package `reasoning-gym`, judged by the tasks themselves."""

from __future__ import annotations

import ast
import functools
from typing import Any

from alignment_modules.functional.http import short
from alignment_modules.rewards.patterns import TimedPattern
from alignment_modules.rewards.protocol import RewardError


class ReasoningGymScore:
    """What a task's own `score_answer` says of each completion, 0 to 1; rows of `ReasoningGymPrompts` name the task.

    An answer on which the task fails, though not on the right one, has 0. Some tasks read answers with sympy, which
    evaluates them: that is no sandbox.

    Args:
        extract: A regular expression; its last match in the completion (its first group, if it has one) is the answer,
            such as "(?s)<answer>(.*?)</answer>". A completion without a match has 0. None: all of the completion.

    Raises:
        ImportError: The package is missing.
        ValueError: If `extract` is not a regular expression.
    """

    name = "reasoning_gym"
    required_columns = ("task", "entry")

    def __init__(self, extract: str | None = None) -> None:
        self.extract = None if extract is None else TimedPattern(extract, "extract")
        try:
            import reasoning_gym.factory  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"ReasoningGymScore needs the package reasoning-gym ({error}): "
                "pip install 'alignment-modules[reasoning-gym]'"
            ) from error

    def __call__(self, completions: list[str], task: list[str], entry: list[str]) -> list[float]:
        """Judges each completion.

        Args:
            completions: N texts.
            task: The column of that name, N texts.
            entry: The column of that name, N texts.

        Returns:
            N numbers.

        Raises:
            RewardError: If a column is not what `ReasoningGymPrompts` writes, or a task cannot judge its own answer.
        """
        rows = enumerate(zip(completions, task, entry, strict=True))
        return [self._score(row, *given) for row, given in rows]

    def _score(self, row: int, completion: str, task: str, entry: str) -> float:
        answer = completion if self.extract is None else self.extract.last(completion)
        judge, problem = _judge(task), _literal("entry", entry, row)
        if answer is None:
            return 0.0
        try:
            return float(judge(answer.strip(), problem))
        except Exception as error:
            try:
                judge(problem["answer"], problem)
            except Exception:
                raise RewardError(f"task {task} cannot judge row {row}: {type(error).__name__}: {error}") from error
            return 0.0


@functools.lru_cache(maxsize=256)
def _judge(task: str) -> Any:
    """The `score_answer` of a task with its parameters."""
    from reasoning_gym.factory import create_dataset

    try:
        name, parameters = _literal("task", task, None)
        return create_dataset(name, **parameters).score_answer
    except Exception as error:
        raise RewardError(f"task={short(task)} is no task of ReasoningGymPrompts: {error}") from error


def _literal(column: str, text: Any, row: int | None) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        place = "" if row is None else f" in row {row}"
        raise RewardError(f"column {column!r} is not what ReasoningGymPrompts writes{place}: {short(text)}") from error
