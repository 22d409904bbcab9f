"""Decoding through transformers' own forward with a key/value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.context import position_limit
from alignment_modules.rollouts.decoders.base import Decoder, accepts, output_logits
from alignment_modules.rollouts.prompts import Prompts


class CachedDecoder:
    """Runs each prompt once, left padded, then one token a step for every sample.

    The forward is the model's own, head included, so logit scales and soft caps are respected. Position ids count real
    tokens only.

    Args:
        policy: A transformers causal language model, or a peft model around one.
        prompts: Prompts without padding.
        num_samples: Continuations per prompt.
        max_new_tokens: Tokens that will be appended.
    """

    def __init__(self, policy: nn.Module, prompts: Prompts, num_samples: int, max_new_tokens: int) -> None:
        from alignment_modules.rollouts.decoders.cache import make_cache

        self.policy, self.prompts, self.num_samples = policy, prompts, num_samples
        name = accepts(policy, "cache", "past_key_values")
        if name is None:
            raise TypeError(f"{type(policy).__name__}.forward takes no key/value cache.")
        config: Any = policy.config
        self.cache = make_cache(config, prompts.longest + max_new_tokens)
        self.options: dict[str, Any] = {name: self.cache, "use_cache": True}
        if accepts(policy, "logits_to_keep"):
            self.options["logits_to_keep"] = 1
        self.takes_positions = accepts(policy, "position_ids") is not None
        self.table = position_limit(policy)
        self.filled = prompts.longest
        self.positions = prompts.lengths.repeat_interleave(num_samples)
        self.steps = 0
        self.cached: Tensor | None = None
        self.mask: Tensor | None = None
        if not bool((prompts.lengths == prompts.longest).all()):
            room = prompts.ids.new_ones(prompts.count, max_new_tokens)
            self.mask = torch.cat((prompts.left_padded()[1].long(), room), dim=1)

    def prefill(self) -> Tensor:  # noqa: D102
        ids, _, positions = self.prompts.left_padded(self.cached)
        logits = self._forward(ids, positions)
        if self.num_samples > 1:
            self._select(torch.arange(len(ids), device=ids.device).repeat_interleave(self.num_samples))
        return logits

    def step(self, tokens: Tensor) -> Tensor:  # noqa: D102
        self.filled, self.steps = self.filled + 1, self.steps + 1
        # A row that has ended goes on while others write, maybe beyond the last position that the model knows.
        positions = self.positions if self.table is None else self.positions.clamp(max=self.table - 1)
        logits = self._forward(tokens[:, None], positions[:, None])
        self.positions = self.positions + 1
        return logits

    def keep(self, rows: Tensor) -> None:  # noqa: D102
        self.positions = self.positions[rows]
        self._select(rows)

    def resume(self, rows: Tensor, lengths: Tensor, contexts: Prompts, max_new_tokens: int) -> Decoder:  # noqa: D102
        from alignment_modules.rollouts.decoders.cache import PreallocatedLayer

        layers: Any = self.cache.layers
        if not all(isinstance(layer, PreallocatedLayer) for layer in layers):
            # A sliding window or a recurrence counts every slot, also those that finished rows filled.
            return CachedDecoder(self.policy, contexts, 1, max_new_tokens)
        written = lengths.clamp(max=self.steps)  # the token sampled last is in no cache yet
        before = torch.arange(self.filled, device=rows.device) < (self.filled - self.steps + written)[:, None]
        if self.mask is not None:
            before = before & self.mask[rows, : self.filled].bool()
        self.prompts, self.num_samples, self.steps = contexts, 1, 0
        self.cached, self.positions = before.sum(1), contexts.lengths
        new = contexts.left_padded(self.cached)[1]
        room = before.new_ones(len(rows), max_new_tokens)
        self.mask, self.filled = torch.cat((before, new, room), dim=1).long(), self.filled + new.shape[1]
        for layer in layers:
            layer.capacity = self.mask.shape[1]
        self.cache.reorder_cache(rows)
        return self

    def _select(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        if self.mask is not None:
            self.mask = self.mask[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        options = dict(self.options)
        if self.takes_positions:
            options["position_ids"] = positions
        mask = None if self.mask is None else self.mask[:, : self.filled]
        return output_logits(self.policy(input_ids=ids, attention_mask=mask, **options))[:, -1]
