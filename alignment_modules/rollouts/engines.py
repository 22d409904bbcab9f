"""Engines make completions: today's sampler in this process, or whatever keeps the same promises elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alignment_modules.functional.support import Support
from alignment_modules.policies.modes import eval_mode
from alignment_modules.policies.sharded import gathered
from alignment_modules.rollouts.codec import Codec, real_tokens
from alignment_modules.rollouts.decoders.base import Decoder
from alignment_modules.rollouts.decoders.select import select_decoder, without_checkpointing
from alignment_modules.rollouts.parameters import SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.sampler import Completions, draw, draw_uniforms, sample_prompts
from alignment_modules.rollouts.seeds import Seeds
from alignment_modules.rollouts.stopping import StopStrings


class Session(Protocol):
    """Completions that go on for several turns, in an engine."""

    turn: Completions
    """What the last turn wrote, one row an open row."""


class Engine(Protocol):
    """Makes completions of the policy that was pushed last; they do not depend on what else is in the batch."""

    def push(self, policy: nn.Module) -> None:
        """Makes `policy`, as it is now, what the engine samples from."""

    def version(self) -> int:
        """How often a policy was pushed."""

    def generate(
        self, prompts: Prompts, parameters: SamplingParameters, *, num_samples: int = 1, seeds: Seeds
    ) -> Completions:
        """`num_samples` completions of each prompt; a prompt's are neighbours.

        Where the parameters truncate the support, the completions tell what was kept at each token (`support`) and
        their log-probabilities are over it. An engine that cannot tell gives log-probabilities over the whole
        vocabulary, or none (NaN): the policy is then scored over the whole vocabulary, from which it did not sample.
        """

    def open(self, prompts: Prompts, parameters: SamplingParameters, *, num_samples: int = 1, seeds: Seeds) -> Session:
        """`generate`, but the completions may be extended; they stand in the session's `turn`."""

    def extend(self, session: Any, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Completions:
        """Appends tokens that the policy did not write, such as a tool's result, and lets it write on.

        Args:
            session: What `open` gave.
            rows: Which completions go on, ascending, of those that went on last time; the others have ended.
            tokens: For each of these rows what is appended, at least one token.

        Returns:
            What the policy wrote in this turn, one row for each of `rows`.
        """

    def close(self, session: Any) -> Completions:
        """Ends the session and gives all completions whole, `own` telling the policy's tokens from the others."""

    def sleep(self) -> None:
        """Gives the accelerator's memory back until `wake`."""

    def wake(self) -> None:
        """Takes it again."""


@dataclass
class _Row:
    """One completion of a session.

    Attributes:
        context: Its tokens, the prompt's first.
        start: Tokens of the prompt.
        turns: Of each turn, where in the context the policy's tokens start, their log-probabilities, and where the
            first one's set stands among those of the session.
        truncated: Whether the last turn ended without a stop.
    """

    context: list[int]
    start: int
    turns: list[tuple[int, Tensor, int]] = field(default_factory=list)
    truncated: bool = True


@dataclass
class _Session:
    parameters: SamplingParameters
    seeds: Seeds
    num_samples: int
    version: int
    rows: list[_Row]
    open: list[int]
    turn: Completions
    decoder: Decoder
    turns: int = 1
    kept: list[Support] = field(default_factory=list)  # of each turn, what was drawn from, where that is known


class InProcessEngine:
    """Samples with the policy's own module, in this process, in eval mode; the policy's own modes are put back after.

    The rows of a session keep their keys and values from turn to turn, where the policy's decoder has some.

    Args:
        codec: For stop strings and padding.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.policy: nn.Module | None = None
        self._version = 0

    def push(self, policy: nn.Module) -> None:
        """Samples from `policy` from now on; nothing is copied."""
        self.policy = policy
        self._version += 1

    def version(self) -> int:
        """How often a policy was pushed."""
        return self._version

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
        turn, decoder = self._sample(prompts, parameters, num_samples, seeds, drop=False)
        contexts = real_tokens(prompts.ids, prompts.mask)
        rows = [_Row([*context], len(context)) for context in contexts for _ in range(num_samples)]
        session = _Session(parameters, seeds, num_samples, self._version, rows, list(range(len(rows))), turn, decoder)
        _append(session)
        return session

    @torch.no_grad()
    def extend(self, session: _Session, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Completions:
        """The next turn of some rows; after a push, or without a cache, all of their context is run again.

        Raises:
            ValueError: If a row has ended, or nothing is appended to one.
            NonFiniteLogits: If the policy's logits are not finite.
        """
        if not rows or sorted({*rows} & {*session.open}) != list(rows) or not all(tokens) or len(tokens) != len(rows):
            raise ValueError(
                f"rows={list(rows)} with {len(tokens)} lists of tokens must be some of the open rows {session.open}, "
                "ascending, each with at least one token to append"
            )
        policy, limit = self._policy(), session.parameters.max_completion_length
        for row, appended in zip(rows, tokens, strict=True):
            session.rows[row].context += appended
        device = session.turn.ids.device
        prompts = Prompts.from_rows([session.rows[row].context for row in rows], device)
        uniforms = draw_uniforms(session.seeds, session.parameters, session.num_samples, device, session.turns)
        with eval_mode(policy), gathered(policy), without_checkpointing(policy):
            factory = select_decoder(policy, prompts.longest + limit)
            if session.version == self._version and type(session.decoder) is factory:
                present = torch.tensor([session.open.index(row) for row in rows], device=device)
                lengths = session.turn.mask.sum(dim=1)[present]
                session.decoder = session.decoder.resume(present, lengths, prompts, limit)
            else:
                session.decoder = factory(policy, prompts, 1, limit)
            session.turn = draw(
                session.decoder,
                len(rows),
                session.parameters,
                None if uniforms is None else uniforms[:, list(rows)].contiguous(),
                stop_strings=self._stop_strings(session.parameters),
                pad_token_id=self.codec.pad_token_id,
                drop=False,
            )
        session.version, session.open, session.turns = self._version, list(rows), session.turns + 1
        _append(session)
        return session.turn

    def close(self, session: _Session) -> Completions:
        """All completions whole, on the host."""
        shape = (len(session.rows), max(len(row.context) - row.start for row in session.rows))
        ids = torch.full(shape, self.codec.pad_token_id)
        mask, own = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        token_logps, sets = torch.zeros(shape), torch.full(shape, -1)
        for number, row in enumerate(session.rows):
            ids[number, : len(row.context) - row.start] = torch.tensor(row.context[row.start :])
            mask[number, : len(row.context) - row.start] = True
            for start, logps, first in row.turns:
                place = slice(start - row.start, start - row.start + len(logps))
                own[number, place], token_logps[number, place] = True, logps
                sets[number, place] = first + torch.arange(len(logps))
        support = Support.cat(session.kept).take(sets) if session.kept else None
        truncated = torch.tensor([row.truncated for row in session.rows])
        return Completions(ids, mask, token_logps, truncated, own, support)

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
                pad_token_id=self.codec.pad_token_id,
                drop=drop,
            )

    def _policy(self) -> nn.Module:
        if self.policy is None:
            raise ValueError("the engine has no policy yet: push one first")
        return self.policy

    def _stop_strings(self, parameters: SamplingParameters) -> StopStrings | None:
        return StopStrings(parameters.stop_strings, self.codec.tokenizer) if parameters.stop_strings else None


def _append(session: _Session) -> None:
    """Adds what was just written to the rows."""
    turn = session.turn
    written, logps, masks = real_tokens(turn.ids, turn.mask), turn.token_logps.cpu(), turn.mask.cpu()
    before = sum(kept.sizes.numel() for kept in session.kept)
    session.kept += [] if turn.support is None else [turn.support]
    for number, (row, cut) in enumerate(zip(session.open, turn.truncated.tolist(), strict=True)):
        one = session.rows[row]
        one.turns.append((len(one.context), logps[number, masks[number]], before + number * masks.shape[1]))
        one.context += written[number]
        one.truncated = cut
