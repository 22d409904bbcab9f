"""What a reward is: a callable from completions to one number each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class RewardError(ValueError):
    """A reward could not be computed; the message names the reward and, where one is to blame, the row."""


class FinalRewardError(RewardError):
    """A reward could not be computed, and would not be by asking again, such as with a wrong key."""


class RewardFunction(Protocol):
    """Judges a batch of completions.

    A reward asks for what it needs by the names of its parameters; each is a list with one entry per completion:

    - `completions`: the completions as text;
    - `prompts`: the prompts as text (or as the data gave them);
    - `prompt_ids`, `completion_ids`: token ids without padding;
    - any other name: the data set's column of that name. `**columns` asks for all columns. A reward that cannot do
      without some of them names them in its attribute `required_columns`: what is missing is found before generation.

    A reward that has a method `limit_to(max_completion_length)` is told how many tokens a completion may have.

    It returns one number per completion. `None` and NaN mean that the reward does not apply to this row. It may be an
    `async def` function.
    """

    def __call__(self, completions: list[str], **columns: Any) -> Sequence[float | None]:
        """Returns one number per completion, or None where the reward does not apply."""
        ...


@dataclass(frozen=True)
class RewardTable:
    """The rewards of N completions under F reward functions.

    Attributes:
        names: The functions' names, in order.
        values: Raw rewards `[N, F]`, float32, before weighting; NaN where a function does not apply.
        total: Weighted sum over the functions that apply, `[N]`, float32; NaN where none does.
        asked: `[N, F]` bool, which completions each function was to judge; None: all.
    """

    names: tuple[str, ...]
    values: Tensor
    total: Tensor
    asked: Tensor | None = None
