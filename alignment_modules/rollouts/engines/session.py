"""Completions of several turns, whoever writes them: what was written, what was appended, and all of it as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignment_modules.functional.support import Support
from alignment_modules.rollouts.codec import real_tokens
from alignment_modules.rollouts.parameters import SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.sampler import Completions
from alignment_modules.rollouts.seeds import Seeds


@dataclass
class Row:
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
class Turns:
    """A session as far as it does not depend on the engine.

    Attributes:
        parameters: How it samples.
        seeds: What it is seeded with.
        num_samples: Completions of each prompt.
        rows: The completions.
        open: Which of them go on.
        turn: What was written last.
        turns: How many turns there were.
        kept: Of each turn, what was drawn from, where that is known.
    """

    parameters: SamplingParameters
    seeds: Seeds
    num_samples: int
    rows: list[Row]
    open: list[int]
    turn: Completions
    turns: int = 0
    kept: list[Support] = field(default_factory=list)

    def append(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], limits: Sequence[int] | None = None
    ) -> list[int] | None:
        """Adds what others wrote to the completions that go on.

        Args:
            rows: Which.
            tokens: For each what is appended.
            limits: For each the most tokens of the next turn, at least 1.

        Returns:
            These limits, none of them above `max_completion_length`; None: there are none.

        Raises:
            ValueError: If a row has ended, nothing is appended to one, or a limit is below 1.
        """
        if not rows or sorted({*rows} & {*self.open}) != list(rows) or not all(tokens) or len(tokens) != len(rows):
            raise ValueError(
                f"rows={list(rows)} with {len(tokens)} lists of tokens must be some of the open rows {self.open}, "
                "ascending, each with at least one token to append"
            )
        for row, appended in zip(rows, tokens, strict=True):
            self.rows[row].context += appended
        if limits is None:
            return None
        if len(limits) != len(rows) or min(limits) < 1:
            raise ValueError(f"limits={list(limits)} must hold a number of at least 1 for each of the {len(rows)} rows")
        return [min(limit, self.parameters.max_completion_length) for limit in limits]

    def contexts(self, rows: Sequence[int]) -> list[list[int]]:
        """All tokens of some completions so far, their prompts' included."""
        return [self.rows[row].context for row in rows]

    def add(self, turn: Completions, rows: Sequence[int]) -> Completions:
        """Adds what the policy wrote to the completions that went on; returns it.

        Args:
            turn: One row for each of these.
            rows: Which.
        """
        written, logps, masks = real_tokens(turn.ids, turn.mask), turn.token_logps.cpu(), turn.mask.cpu()
        before = sum(kept.sizes.numel() for kept in self.kept)
        self.kept += [] if turn.support is None else [turn.support]
        for number, (row, cut) in enumerate(zip(rows, turn.truncated.tolist(), strict=True)):
            one = self.rows[row]
            one.turns.append((len(one.context), logps[number, masks[number]], before + number * masks.shape[1]))
            one.context += written[number]
            one.truncated = cut
        self.turn, self.open, self.turns = turn, list(rows), self.turns + 1
        return turn

    def whole(self, pad_token_id: int) -> Completions:
        """All completions, on the host."""
        shape = (len(self.rows), max(len(row.context) - row.start for row in self.rows))
        ids = torch.full(shape, pad_token_id)
        mask, own = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        token_logps, sets = torch.zeros(shape), torch.full(shape, -1)
        for number, row in enumerate(self.rows):
            ids[number, : len(row.context) - row.start] = torch.tensor(row.context[row.start :])
            mask[number, : len(row.context) - row.start] = True
            for start, logps, first in row.turns:
                place = slice(start - row.start, start - row.start + len(logps))
                own[number, place], token_logps[number, place] = True, logps
                sets[number, place] = first + torch.arange(len(logps))
        support = Support.cat(self.kept).take(sets) if self.kept else None
        truncated = torch.tensor([row.truncated for row in self.rows])
        return Completions(ids, mask, token_logps, truncated, own, support)


def rows_of(prompts: Prompts, num_samples: int) -> list[Row]:
    """The completions of a session before anything is written: a prompt's are neighbours."""
    contexts = real_tokens(prompts.ids, prompts.mask)
    return [Row([*context], len(context)) for context in contexts for _ in range(num_samples)]
