"""The sampler in this process, with the policy's own module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.compiling import without_graphs
from alignment_modules.policies.modes import eval_mode
from alignment_modules.policies.sharded import gathered
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.decoders.base import Decoder
from alignment_modules.rollouts.decoders.select import select_decoder, without_checkpointing
from alignment_modules.rollouts.engines.protocol import Engine
from alignment_modules.rollouts.engines.session import Turns, rows_of
from alignment_modules.rollouts.parameters import SamplingOptions, SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.sampler import Completions, draw, draw_uniforms, sample_prompts
from alignment_modules.rollouts.seeds import Seeds
from alignment_modules.rollouts.stopping import StopStrings


@dataclass
class _Session(Turns):
    """Also the decoder, whose cache serves until the policy changes."""

    decoder: Decoder | None = None
    version: int = 0


class InProcessEngine(Engine):
    """Samples with the policy's own module, in this process, in eval mode; the policy's own modes are put back after.

    The rows of a session keep their keys and values from turn to turn, where the policy's decoder has some.

    Args:
        codec: For stop strings and padding.
    """

    correction: str | None = None  # what samples is what is scored

    def __init__(self, codec: Codec) -> None:
        self.codec: Codec | None = codec
        self.policy: nn.Module | None = None
        self._version = 0

    def check(self, option: str, sampling: SamplingOptions) -> None:
        """Refuses nothing."""

    def push(self, policy: nn.Module) -> None:
        """Samples from `policy` from now on; nothing is copied."""
        self.policy = policy
        self._version += 1

    def version(self) -> int:
        """How often a policy was pushed."""
        return self._version

    def statistics(self) -> dict[str, Statistic]:
        """Nothing: the policy that samples is the one that is trained."""
        return {}

    def describe(self) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""

    def generate(
        self, prompts: Prompts, parameters: SamplingParameters, *, num_samples: int = 1, seeds: Seeds
    ) -> Completions:
        """Completions of each prompt; finished ones cost nothing more.

        Raises:
            NonFiniteLogits: If the policy's logits are not finite.
        """
        return self._sample(prompts, parameters, num_samples, seeds, drop=True)[0]

    def open(self, prompts: Prompts, parameters: SamplingParameters, *, num_samples: int = 1, seeds: Seeds) -> _Session:
        """The first turn of a session.

        Raises:
            NonFiniteLogits: If the policy's logits are not finite.
        """
        rows = rows_of(prompts, num_samples)
        turn, decoder = self._sample(prompts, parameters, num_samples, seeds, drop=False)
        session = _Session(parameters, seeds, num_samples, rows, [], turn, decoder=decoder, version=self._version)
        session.add(turn, range(len(rows)))
        return session

    @torch.no_grad()
    def extend(
        self,
        session: _Session,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        limits: Sequence[int] | None = None,
    ) -> Completions:
        """The next turn of some rows; after a push, or without a cache, all of their context is run again.

        Raises:
            ValueError: If a row has ended, nothing is appended to one, or a limit is below 1.
            NonFiniteLogits: If the policy's logits are not finite.
        """
        bounds = session.append(rows, tokens, limits)
        policy, limit = self._policy(), max(bounds or [session.parameters.max_completion_length])
        device = session.turn.ids.device
        prompts = Prompts.from_rows(session.contexts(rows), device)
        uniforms = draw_uniforms(session.seeds, session.parameters, session.num_samples, device, session.turns)
        with eval_mode(policy), gathered(policy), without_checkpointing(policy), without_graphs(policy):
            factory = select_decoder(policy, prompts.reach(bounds or [limit] * len(rows)))
            former = session.decoder
            if former is not None and session.version == self._version and type(former) is factory:
                present = torch.tensor([session.open.index(row) for row in rows], device=device)
                lengths = session.turn.mask.sum(dim=1)[present]
                session.decoder = former.resume(present, lengths, prompts, limit)
            else:
                session.decoder = factory(policy, prompts, 1, limit)
            turn = draw(
                session.decoder,
                len(rows),
                session.parameters,
                None if uniforms is None else uniforms[:, list(rows)].contiguous(),
                limits=None if bounds is None else torch.tensor(bounds),
                stop_strings=self._stop_strings(session.parameters),
                pad_token_id=self._codec.pad_token_id,
                drop=False,
            )
        session.version = self._version
        return session.add(turn, rows)

    def close(self, session: _Session) -> Completions:
        """All completions whole, on the host."""
        return session.whole(self._codec.pad_token_id)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """The policy is whole on each process inside."""
        with gathered(self._policy()):
            yield

    def sleep(self) -> None:
        """Nothing to give back: the weights are the policy's own."""

    def wake(self) -> None:
        """Nothing to take."""

    def _sample(
        self, prompts: Prompts, parameters: SamplingParameters, num_samples: int, seeds: Seeds, *, drop: bool
    ) -> tuple[Completions, Decoder]:
        policy = self._policy()
        with eval_mode(policy), gathered(policy):
            return sample_prompts(
                policy,
                prompts,
                parameters,
                num_samples=num_samples,
                seeds=seeds,
                stop_strings=self._stop_strings(parameters),
                pad_token_id=self._codec.pad_token_id,
                drop=drop,
            )

    @property
    def _codec(self) -> Codec:
        return self.codec or Codec()

    def _policy(self) -> nn.Module:
        if self.policy is None:
            raise ValueError("the engine has no policy yet: push one first")
        return self.policy

    def _stop_strings(self, parameters: SamplingParameters) -> StopStrings | None:
        return StopStrings(parameters.stop_strings, self._codec.tokenizer) if parameters.stop_strings else None
