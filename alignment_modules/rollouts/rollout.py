"""Rollout: completions of a batch of prompts, what an update needs of them, and how they are cut into pieces."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

PER_PROMPT = {"per": "prompt"}
"""Metadata of a field of `Rollout` with one row a prompt; every other tensor has one row a completion."""


@dataclass(frozen=True)
class Rollout:
    """P prompts with `group` completions each: N = P * group rows, a prompt's completions beside each other.

    What says which tokens there are stays on the host, where segments are built.

    Attributes:
        prompt_ids: [P, L] int64, on the host.
        prompt_mask: [P, L] bool, on the host.
        group: Completions of a prompt.
        ids: [N, T] int64, on the host: the completions, and what others wrote between their parts, such as a tool.
        mask: [N, T] bool, on the host: the token exists.
        own: [N, T] bool, on the host: the policy wrote it, from something before it. Sums over the policy's tokens, KL
            and entropy take this one.
        trained: [N, T] bool, on the host: `own` less what a paradigm leaves out of its loss.
        rewards: [N] float32; NaN: not judged.
        reward_values: [N, rewards] float32, each reward by itself, before weighting; NaN: it does not apply.
        truncated: [N] bool, on the host: the completion ends without a stop.
        sampled_logps: [N, T] float32: log-probabilities that the engine sampled with; NaN where it told none.
        advantages: [N] or [N, T] float32.
        old_logps: [N, T] float32, of the policy that the ratio compares with; None: the policy as it is, and the ratio
            is exactly 1.
        reference_logps: [N, T] float32.
        gradient_norms: [N, T] float32, of each token's log-probability in the logits, squared.
        greedy_rewards: [P] float32, of a greedy completion of each prompt; NaN: not judged.
        values: [N, T] float32, a critic's.
        returns: [N, T] float32, what the critic is to learn.
        weights: [N] or [N, T] float32, of the loss.

    Raises:
        ValueError: If a field has another number of rows than the rollout.
    """

    prompt_ids: Tensor = field(metadata=PER_PROMPT)
    prompt_mask: Tensor = field(metadata=PER_PROMPT)
    group: int
    ids: Tensor
    mask: Tensor
    own: Tensor
    trained: Tensor
    rewards: Tensor
    truncated: Tensor
    sampled_logps: Tensor
    reward_values: Tensor | None = None
    gradient_norms: Tensor | None = None
    greedy_rewards: Tensor | None = field(default=None, metadata=PER_PROMPT)
    advantages: Tensor | None = None
    old_logps: Tensor | None = None
    reference_logps: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        prompts = self.prompt_ids.shape[0]
        for name, values, per in self._tensors():
            rows = prompts * self.group if per == "completion" else prompts
            if values.shape[0] != rows:
                raise ValueError(
                    f"{type(self).__name__}.{name} has {values.shape[0]} rows; {prompts} prompts with {self.group} "
                    f"completions each need {rows}, one a {per}"
                )

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    def _tensors(self) -> Iterator[tuple[str, Tensor, str]]:
        """Every tensor with its name and what it has a row for: "prompt" or "completion"."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                yield one.name, value, one.metadata.get("per", "completion")

    def select(self, prompts: Tensor | slice, completions: slice = slice(None)) -> "Rollout":
        """The same completions (by position in their group) of some of the prompts.

        Args:
            prompts: [P] bool, or int64 indices, on the host; or a slice.
            completions: Which of each group.
        """
        cut: dict[str, Any] = {"group": len(range(self.group)[completions])}
        for name, values, per in self._tensors():
            if per == "prompt":
                cut[name] = values[prompts]
            else:
                grouped = values.reshape(len(self), self.group, *values.shape[1:])
                cut[name] = grouped[prompts][:, completions].flatten(0, 1)
        return replace(self, **cut)

    def empty(self) -> "Rollout":
        """The same rollout without any prompt."""
        return self.select(slice(0, 0))

    def minibatches(self, count: int, generator: torch.Generator) -> Iterator["Rollout"]:
        """Cuts the prompts into `count` parts in random order; the last are empty where there are fewer prompts."""
        order = torch.randperm(len(self), generator=generator)
        for part in order.tensor_split(count):
            yield self.select(part.sort().values)

    def micro_batches(self, size: int | None) -> list["Rollout"]:
        """Cuts into pieces of at most `size` completions; whole groups stay together where `size` allows."""
        if size is None:
            return [self] if len(self) else []
        prompts, completions = max(size // self.group, 1), min(size, self.group)
        return [
            self.select(slice(start, start + prompts), slice(first, first + completions))
            for start in range(0, len(self), prompts)
            for first in range(0, self.group, completions)
        ]
