"""An episode while it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment_modules.functional.http import short
from alignment_modules.rollouts.environments.episode import CallMade, Episode, StopReason
from alignment_modules.rollouts.environments.parsing import Call, Parsed
from alignment_modules.rollouts.environments.results import Result
from alignment_modules.rollouts.environments.running import Job, Outcome, Request
from alignment_modules.rollouts.environments.schemas import Tool

_NOTHING: Mapping[str, Tool] = {}


@dataclass(eq=False)
class UnderWay:
    """One completion of several turns, as far as it has come.

    Attributes:
        row: Which completion of the batch it is.
        name: Of its environment; None: there are tools alone.
        environment: As it was made; None: there is none, or it could not be made.
        tools: What its calls may name.
        schemas: The same, as its chat template reads them.
        prompt: Messages before the policy's first turn.
        told: What `reset` said, which the last of the user's messages ends with.
        limit: Most tokens of all its turns and results together.
        by_context: Whether that is what the model's context leaves, and not the completion's own limit.
        used: Tokens so far.
        ends_whole: Whether the last turn ended by itself.
    """

    row: int
    name: str | None
    environment: Any = None
    tools: Mapping[str, Tool] = field(default_factory=lambda: _NOTHING)
    schemas: list[dict[str, Any]] = field(default_factory=list)
    prompt: list[dict[str, Any]] = field(default_factory=list)
    told: str = ""
    limit: int = 0
    by_context: bool = False
    used: int = 0
    turns: int = 0
    tool_tokens: int = 0
    stop_reason: StopReason | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    calls: list[CallMade] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    reward: float | None = None
    turn_rewards: list[float] | None = None

    @property
    def room(self) -> int:
        """Tokens that it may still have."""
        return self.limit - self.used

    @property
    def out_of_room(self) -> StopReason:
        """Why it ends where there is no room."""
        return "context" if self.by_context else "length"

    def fail(self, where: str, error: str) -> None:
        """Notes what failed in its environment."""
        self.errors.append(f"{where}: {error.removeprefix('Error: ')}")

    def took(self, outcome: Outcome) -> None:
        """Takes what `reset` returned.

        Args:
            outcome: Text, None, or what went wrong.
        """
        if outcome.reason:
            self.fail("reset", outcome.error)
        elif outcome.value is not None and not isinstance(outcome.value, str):
            self.fail("reset", f"it returned {short(outcome.value)}, which is neither text nor None")

    def reason_to_end(
        self, parsed: Parsed, *, truncated: bool, max_turns: int, max_tool_calls: int | None
    ) -> StopReason | None:
        """Why a turn was the last; None: its calls are to be answered.

        Args:
            parsed: What it says.
            truncated: Whether it was cut off.
            max_turns: Turns that the policy has.
            max_tool_calls: Calls that it has; None: any number.
        """
        asked = len(parsed.calls) + len(parsed.errors)
        if truncated:
            return self.out_of_room
        if not asked or self.errors:
            return "answer"
        if self.turns >= max_turns:
            return "max_turns"
        if max_tool_calls is not None and len(self.calls) + asked > max_tool_calls:
            return "max_tool_calls"
        return None

    def requests(self, calls: Sequence[Call]) -> list[Request]:
        """Calls of a turn, with what they may name."""
        return [Request(call, self.tools) for call in calls]

    def answered(self, parsed: Parsed, results: Sequence[Result]) -> None:
        """Notes the calls of the last turn with their results.

        Args:
            parsed: What the turn said.
            results: Of those that could be read, then of those that could not.
        """
        asked = [*parsed.calls, *(None for _ in parsed.errors)]
        turn = self.turns - 1
        self.calls += [CallMade(turn, call, result) for call, result in zip(asked, results, strict=True)]

    def last_jobs(self) -> dict[str, Job]:
        """What its environment is asked in the end, by the method's name; nothing where it failed."""
        if self.environment is None or self.errors:
            return {}
        methods = {name: getattr(self.environment, name, None) for name in ("get_reward", "turn_rewards")}
        return {name: Job(method, owner=self.environment) for name, method in methods.items() if callable(method)}

    def judged(self, outcomes: Mapping[str, Outcome]) -> None:
        """Takes the rewards of its environment; NaN where there should be one and is none.

        Args:
            outcomes: Of `last_jobs`.
        """
        if "get_reward" in outcomes:
            self.reward = self._number(outcomes["get_reward"], "get_reward")
        if "turn_rewards" in outcomes:
            self.turn_rewards = self._numbers(outcomes["turn_rewards"])

    def unjudged(self, *, reward: bool, turn_rewards: bool) -> None:
        """NaN in place of rewards that its environment would have given, had it not failed.

        Args:
            reward: Whether it has `get_reward`.
            turn_rewards: Whether it has `turn_rewards`.
        """
        self.reward = math.nan if reward else None
        self.turn_rewards = [math.nan] * self.turns if turn_rewards else None

    def finished(self) -> Episode:
        """What became of it."""
        return Episode(
            environment=self.name,
            prompt=self.prompt,
            messages=self.messages,
            turns=self.turns,
            calls=self.calls,
            stop_reason=self.stop_reason or "answer",
            tool_tokens=self.tool_tokens,
            reward=self.reward,
            turn_rewards=self.turn_rewards,
            errors=self.errors,
        )

    def _number(self, outcome: Outcome, where: str) -> float:
        if outcome.reason:
            self.fail(where, outcome.error)
            return math.nan
        if (found := _finite(outcome.value)) is None:
            self.fail(where, f"it returned {short(outcome.value)}, which is no finite number")
            return math.nan
        return found

    def _numbers(self, outcome: Outcome) -> list[float]:
        where, nothing = "turn_rewards", [math.nan] * self.turns
        if outcome.reason:
            self.fail(where, outcome.error)
            return nothing
        given = list(outcome.value) if isinstance(outcome.value, list | tuple) else [None]
        found = [_finite(one) for one in given]
        if None in found or len(found) != self.turns:
            self.fail(where, f"it returned {short(outcome.value)}, which is no list of {self.turns} finite numbers")
            return nothing
        return [one for one in found if one is not None]


def _finite(value: Any) -> float | None:
    """A number, such as a tensor's; None where it is none."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except Exception:  # whatever an object of a user's does
        return None
    return number if math.isfinite(number) else None
