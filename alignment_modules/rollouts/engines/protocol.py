"""What an engine promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import nn

from alignment_modules.functional.statistics import Statistic
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.parameters import SamplingOptions, SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.sampler import Completions
from alignment_modules.rollouts.seeds import Seeds


class EngineError(RuntimeError):
    """An engine cannot give what was asked of it, or gives what the policy would not; the message says what to do."""


class Session(Protocol):
    """Completions that go on for several turns, in an engine."""

    turn: Completions
    """What the last turn wrote, one row an open row."""


class Engine(ABC):
    """Makes completions of the policy that was pushed last; they do not depend on what else is in the batch.

    `push`, `version` and `generate` are all that an engine needs; the rest says what else it can do.
    """

    codec: Codec | None = None
    """For stop strings and padding; a module gives its own where there is none."""
    correction: str | None = None
    """The gate (`CORRECTIONS`) that its completions need because it computes otherwise than the trainer; None: none."""

    def check(self, option: str, sampling: SamplingOptions) -> None:
        """Refuses what it cannot sample with, before anything is sampled.

        Args:
            option: What stands before an option's name in messages.
            sampling: What people chose.

        Raises:
            ValueError: If it cannot.
        """
        return

    @abstractmethod
    def push(self, policy: nn.Module) -> None:
        """Makes `policy`, as it is now, what the engine samples from."""

    @abstractmethod
    def version(self) -> int:
        """Which policy it samples from: a number that grows with what is pushed."""

    def statistics(self) -> dict[str, Statistic]:
        """What is logged of it with a rollout: `engine/version`, and more; nothing where there is but one policy."""
        return {}

    def describe(self) -> str | None:
        """The engine in words, for the start of a run; None: nothing."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a run that resumes needs of it, in plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        return

    @abstractmethod
    def generate(
        self, prompts: Prompts, parameters: SamplingParameters, *, num_samples: int = 1, seeds: Seeds
    ) -> Completions:
        """`num_samples` completions of each prompt; a prompt's are neighbours.

        A prompt's own limit (`prompts.limits`, or `prompts.bounds(parameters.max_completion_length)`) ends its
        completions like `max_completion_length` and changes no token before.

        Where the parameters truncate the support, the completions tell what was kept at each token (`support`) and
        their log-probabilities are over it. An engine that cannot tell gives log-probabilities over the whole
        vocabulary, or none (NaN): the policy is then scored over the whole vocabulary, from which it did not sample.
        """

    @property
    def has_sessions(self) -> bool:
        """Whether completions may go on for several turns."""
        return type(self).open is not Engine.open

    def open(self, prompts: Prompts, parameters: SamplingParameters, *, num_samples: int = 1, seeds: Seeds) -> Session:
        """`generate`, but the completions may be extended; they stand in the session's `turn`.

        Raises:
            EngineError: If it has no sessions.
        """
        raise _without_sessions(self)

    def extend(
        self,
        session: Any,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        limits: Sequence[int] | None = None,
    ) -> Completions:
        """Appends tokens that the policy did not write, such as a tool's result, and lets it write on.

        Args:
            session: What `open` gave.
            rows: Which completions go on, ascending, of those that went on last time; the others have ended.
            tokens: For each of these rows what is appended, at least one token.
            limits: For each of these rows the most tokens of this turn, which change no token before; None:
                `max_completion_length` of all.

        Returns:
            What the policy wrote in this turn, one row for each of `rows`.
        """
        raise _without_sessions(self)

    def close(self, session: Any) -> Completions:
        """Ends the session and gives all completions whole, `own` telling the policy's tokens from the others."""
        raise _without_sessions(self)

    def scope(self) -> AbstractContextManager[None]:
        """Around sessions of which other processes may have more turns, or fewer: inside nobody waits for anybody."""
        return nullcontext()

    def sleep(self) -> None:
        """Gives the accelerator's memory back until `wake`."""
        return

    def wake(self) -> None:
        """Takes it again."""
        return


def _without_sessions(engine: Engine) -> EngineError:
    return EngineError(f"{type(engine).__name__} has no sessions: its completions do not go on for several turns")
