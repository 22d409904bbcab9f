"""Rollout: completions of a batch of prompts, what an update needs of them, and how they are cut into pieces."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """G completions of each of P prompts, grouped by prompt.

    Attributes:
        prompt_ids: [P, L] int64.
        prompt_mask: [P, L] bool.
        completion_ids: [P, G, T] int64.
        completion_mask: [P, G, T] bool: real tokens, the stop token included.
        loss_mask: [P, G, T] bool: the tokens that are trained on.
        advantages: [P, G] float32.
        old_logps: [P, G, T] float32: log-probabilities under the policy that sampled.
        reference_logps: [P, G, T] float32, or None without a KL term in the loss.
        on_policy: Whether the policy has not changed since it sampled; the first ratio is then exactly 1.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    loss_mask: Tensor
    advantages: Tensor
    old_logps: Tensor
    reference_logps: Tensor | None = None
    on_policy: bool = False

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def select(self, prompts: Tensor | slice, completions: slice = slice(None)) -> "Rollout":
        """The same completions (by position in their group) of some of the prompts."""
        grouped = {
            name: getattr(self, name)[prompts][:, completions]
            for name in ("completion_ids", "completion_mask", "loss_mask", "advantages", "old_logps")
        }
        reference = None if self.reference_logps is None else self.reference_logps[prompts][:, completions]
        return replace(
            self,
            prompt_ids=self.prompt_ids[prompts],
            prompt_mask=self.prompt_mask[prompts],
            reference_logps=reference,
            **grouped,
        )

    def empty(self) -> "Rollout":
        """The same rollout without any prompt."""
        return self.select(slice(0, 0))

    def minibatches(self, count: int, generator: torch.Generator) -> Iterator["Rollout"]:
        """Cuts the prompts into `count` parts in random order; the last are empty where there are fewer prompts."""
        order = torch.randperm(len(self), generator=generator)
        for part in order.tensor_split(count):
            yield self.select(part.sort().values.to(self.prompt_ids.device))

    def micro_batches(self, size: int | None) -> list["Rollout"]:
        """Cuts into pieces of at most `size` completions; whole groups stay together where `size` allows."""
        group = self.completion_ids.shape[1]
        if size is None:
            return [self] if len(self) else []
        prompts, completions = max(size // group, 1), min(size, group)
        return [
            self.select(slice(start, start + prompts), slice(first, first + completions))
            for start in range(0, len(self), prompts)
            for first in range(0, group, completions)
        ]
