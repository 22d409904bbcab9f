"""The narrow interface between the sampler and a model, and the slow decoder that works for every model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alignment_modules.policies.context import length_limit, position_limit
from alignment_modules.rollouts.prompts import Prompts


class Decoder(Protocol):
    """Next-token logits of several continuations of each prompt, one step at a time.

    A decoder starts with one row per continuation, row `p * num_samples + g`. It may return a buffer that its next
    call overwrites.
    """

    def prefill(self) -> Tensor:
        """Logits `[prompts, vocabulary]` of the first token after each prompt. Called once, first."""

    def step(self, tokens: Tensor) -> Tensor:
        """Appends one token to each row and returns the logits `[rows, vocabulary]` of the next.

        Args:
            tokens: `[rows]` int64.
        """

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these.

        Args:
            rows: `[kept]` int64 indices into the present rows, ascending.
        """

    def resume(self, rows: Tensor, lengths: Tensor, contexts: Prompts, max_new_tokens: int) -> Decoder:
        """A decoder of the next turn of some rows, whose `prefill` runs what is not in the cache yet.

        Args:
            rows: `[kept]` int64 indices into the present rows, ascending, none of which was dropped.
            lengths: `[kept]` tokens that were drawn for each of them; what was fed beyond them is forgotten.
            contexts: One prompt a row: the row's old prompt, these tokens, and what follows them.
            max_new_tokens: Tokens that will be appended.

        Returns:
            A decoder with one row a prompt; this one is not to be used any more.
        """


DecoderFactory = Callable[[nn.Module, Prompts, int, int], Decoder]
"""Makes a decoder from policy, prompts, samples per prompt, and the number of tokens to make room for."""


def plain_forward(policy: nn.Module) -> Callable[..., Any]:
    """The forward whose signature tells what a policy takes (the wrapped model's for a peft model)."""
    base = getattr(policy, "get_base_model", None)
    return (base() if callable(base) else policy).forward


def accepts(policy: nn.Module, *names: str) -> str | None:
    """The first of `names` that the policy's forward takes as a parameter, or None."""
    parameters = inspect.signature(plain_forward(policy)).parameters
    return next((name for name in names if name in parameters), None)


def output_logits(output: Any) -> Tensor:
    """Logits from what a causal model returns: a tensor, an object with `.logits`, or a tuple that starts with them.

    Raises:
        TypeError: If there are none.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, tuple) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor):
        raise TypeError(f"policy must return logits or an object with `.logits`, got {type(output).__name__}.")
    return logits


class RecomputeDecoder:
    """Runs the whole sequence again for every token: slow, and right for any causal module from ids to logits.

    Rows are right padded, which a causal module never sees at the positions that are read.

    Args:
        policy: Maps `input_ids [rows, time]` to logits.
        prompts: Prompts without padding.
        num_samples: Continuations per prompt.
        max_new_tokens: Tokens that will be appended.
    """

    def __init__(self, policy: nn.Module, prompts: Prompts, num_samples: int, max_new_tokens: int) -> None:
        self.policy = policy
        self.prompts = prompts
        room = prompts.ids.new_zeros(prompts.count, max_new_tokens)
        self.ids = torch.cat((prompts.ids, room), dim=1).repeat_interleave(num_samples, dim=0)
        self.lengths = prompts.lengths.repeat_interleave(num_samples)
        self.options = {"use_cache": False} if accepts(policy, "use_cache") else {}
        self.limit, self.table = length_limit(policy), position_limit(policy)

    def prefill(self) -> Tensor:  # noqa: D102
        return self._logits(self.prompts.ids, self.prompts.lengths)

    def step(self, tokens: Tensor) -> Tensor:  # noqa: D102
        # A row that has ended goes on while others write, maybe beyond the last position that the model knows.
        places = self.lengths if self.table is None else self.lengths.clamp(max=self.table - 1)
        self.ids.scatter_(1, places[:, None], tokens[:, None])
        self.lengths = places + 1
        return self._logits(self.ids[:, : int(self.lengths.max())], self.lengths)

    def keep(self, rows: Tensor) -> None:  # noqa: D102
        self.ids, self.lengths = self.ids[rows], self.lengths[rows]

    def resume(self, rows: Tensor, lengths: Tensor, contexts: Prompts, max_new_tokens: int) -> Decoder:  # noqa: D102
        return RecomputeDecoder(self.policy, contexts, 1, max_new_tokens)

    def _logits(self, ids: Tensor, lengths: Tensor) -> Tensor:
        if self.limit is not None and ids.shape[1] > self.limit:
            rows = [row[None, :length] for row, length in zip(ids, lengths.tolist(), strict=True)]
            return torch.cat([output_logits(self.policy(row, **self.options))[:, -1] for row in rows])
        logits = output_logits(self.policy(ids, **self.options))
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise ValueError(
                f"policy must map ids of shape {list(ids.shape)} to logits [rows, time, vocabulary], "
                f"got {list(logits.shape)}."
            )
        return logits[torch.arange(len(ids), device=ids.device), lengths - 1]
