"""An episode: what a policy wrote turn by turn, which tools it called, what they answered, and how it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from alignment_modules.rollouts.environments.parsing import Call
from alignment_modules.rollouts.environments.results import Result

StopReason = Literal["answer", "max_turns", "max_tool_calls", "length", "context"]
"""Why an episode ended: the policy called no tool; one call or turn more than allowed; the completion's or the model's
longest length."""

STOP_REASONS: tuple[StopReason, ...] = get_args(StopReason)
"""Every reason for which an episode ends."""


@dataclass(frozen=True)
class CallMade:
    """A call and its answer.

    Attributes:
        turn: In which turn of the policy, from 0.
        call: As it was written; None: it could not be read.
        result: What it was answered with.
    """

    turn: int
    call: Call | None
    result: Result


@dataclass(frozen=True)
class Episode:
    """One completion of several turns.

    Attributes:
        environment: Name of the environment; None: there were tools alone.
        prompt: Messages before the policy's first turn, with the text of `reset`.
        messages: Those that followed: the policy's (`assistant`, with `tool_calls` where it made some) and the results
            (`tool`), as chat templates read them.
        turns: How often the policy wrote.
        calls: All calls in order, those that could not be read, too.
        stop_reason: Why it ended.
        tool_tokens: Tokens between the policy's turns, which it did not write.
        reward: Of `get_reward`; None: the environment has none; NaN: it failed.
        turn_rewards: Of `turn_rewards`, one a turn of the policy; None as above; NaN where it failed.
        errors: What failed in the environment itself (its making, `reset`, `get_reward`), in words.
    """

    environment: str | None
    prompt: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    turns: int
    calls: list[CallMade]
    stop_reason: StopReason
    tool_tokens: int = 0
    reward: float | None = None
    turn_rewards: list[float] | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """Text of the policy's last turn."""
        written = [message for message in self.messages if message["role"] == "assistant"]
        return str(written[-1].get("content") or "") if written else ""

    @property
    def failures(self) -> int:
        """Calls that failed, those that could not be read included."""
        return sum(made.result.failed for made in self.calls)

    @property
    def malformed(self) -> int:
        """Calls that could not be read."""
        return sum(made.call is None for made in self.calls)

    @property
    def failed(self) -> bool:
        """Whether its environment failed, so that the episode is not judged."""
        return bool(self.errors) or (self.reward is not None and math.isnan(self.reward))
