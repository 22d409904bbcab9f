"""Rollout: completions of a batch of prompts, what an update needs of them, and how they are cut into pieces."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment_modules.functional.support import Support

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
        turn_rewards: [N, T] float32, the part of `rewards` that environments gave for single turns, at the last token
            of each; None: there is no such part.
        truncated: [N] bool, on the host: the completion ends without a stop, or an episode without an answer.
        sampled_logps: [N, T] float32: log-probabilities that the engine sampled with, over `support`; NaN where it told
            none.
        advantages: [N] or [N, T] float32.
        old_logps: [N, T] float32, of the policy that the ratio compares with; None: the policy as it is, and the ratio
            is exactly 1.
        reference_logps: [N, T] float32.
        gradient_norms: [N, T] float32, of each token's log-probability in the logits, squared.
        greedy_rewards: [P] float32, of a greedy completion of each prompt; NaN: not judged.
        values: [N, T] float32, a critic's.
        returns: [N, T] float32, what the critic is to learn.
        weights: [N] or [N, T] float32, of the loss.
        support: [N, T], on the host: what top-k, top-p and min-p kept where each token was drawn; None: everything, or
            it is not known. Old policy and policy are scored over it.
        covariant: [N, T] bool: what a loss treats apart for its covariance.
        prompt_tokens: [N] int64: trained tokens of all completions of the row's prompt.
        source_name: P names of the sources that the prompts are from; None: they have none.
        source_weights: [P] float32, factors of the loss of the prompts' completions; None: 1.

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
    turn_rewards: Tensor | None = None
    gradient_norms: Tensor | None = None
    greedy_rewards: Tensor | None = field(default=None, metadata=PER_PROMPT)
    advantages: Tensor | None = None
    old_logps: Tensor | None = None
    reference_logps: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    weights: Tensor | None = None
    support: Support | None = None
    covariant: Tensor | None = None
    prompt_tokens: Tensor | None = None
    source_name: list[str] | None = field(default=None, metadata=PER_PROMPT)
    source_weights: Tensor | None = field(default=None, metadata=PER_PROMPT)

    def __post_init__(self) -> None:
        if isinstance(self.support, dict):  # of a state
            object.__setattr__(self, "support", Support(**self.support))
        prompts = self.prompt_ids.shape[0]
        for name, values, per in self._tensors():
            rows = prompts * self.group if per == "completion" else prompts
            if len(values) != rows:
                raise ValueError(
                    f"{type(self).__name__}.{name} has {len(values)} rows; {prompts} prompts with {self.group} "
                    f"completions each need {rows}, one a {per}"
                )

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    def _tensors(self) -> Iterator[tuple[str, Tensor | Support | list[str], str]]:
        """Every tensor or list with its name and what it has a row for: "prompt" or "completion"."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, (Tensor, Support, list)):
                yield one.name, value, one.metadata.get("per", "completion")

    def select(self, prompts: Tensor | slice, completions: slice | Tensor = slice(None)) -> "Rollout":
        """Some of the completions (by position in their group) of some of the prompts.

        Args:
            prompts: [P] bool, or int64 indices, on the host; or a slice.
            completions: Which of each group; or of each selected prompt its own, [selected, K] int64, on the host.
        """
        group = len(range(self.group)[completions]) if isinstance(completions, slice) else completions.shape[1]
        cut: dict[str, Any] = {"group": group}
        for name, values, per in self._tensors():
            if isinstance(values, list):
                cut[name] = [values[place] for place in torch.arange(len(values))[prompts].tolist()]
            elif per == "prompt":
                cut[name] = values[prompts]
            elif isinstance(values, Support):
                grouped = torch.arange(len(values)).view(len(self), self.group)[prompts]
                cut[name] = values[_of_each(grouped, completions).flatten()]
            else:
                grouped = values.reshape(len(self), self.group, *values.shape[1:])[prompts]
                cut[name] = _of_each(grouped, completions).flatten(0, 1)
        return replace(self, **cut)

    @classmethod
    def join(cls, parts: "Sequence[Rollout]") -> "Rollout":
        """The prompts of several rollouts in order, padded on the right to the widest, on the devices of the last.

        Args:
            parts: At least one; with the same fields, and groups of one size.

        Raises:
            ValueError: If one has a field that another lacks, or groups of another size.
        """
        first, joined = parts[-1], dict[str, Any]()
        for one in fields(first):
            values = [getattr(part, one.name) for part in parts]
            if all(isinstance(value, Tensor) for value in values):
                joined[one.name] = _stack(values, one.name)
            elif all(isinstance(value, Support) for value in values):
                joined[one.name] = Support.stack(values)
            elif all(isinstance(value, list) for value in values):
                joined[one.name] = [entry for value in values for entry in value]
            elif any(isinstance(value, (Tensor, Support, list)) for value in values) or any(
                value != values[0] for value in values
            ):
                raise ValueError(f"rollouts cannot be joined: {one.name} is not of one kind in all of them")
        return replace(first, **joined)

    def state_dict(self) -> dict[str, Any]:
        """All that it holds, in plain types and tensors on the host: `Rollout(**state)` is the same again."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        state = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}
        return state | {"support": None if self.support is None else self.support.state_dict()}

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


def _of_each(grouped: Tensor, completions: slice | Tensor) -> Tensor:
    """Some completions of every group: [prompts, group, ...] to [prompts, K, ...]."""
    if isinstance(completions, slice):
        return grouped[:, completions]
    return grouped[torch.arange(len(grouped))[:, None].to(grouped.device), completions.to(grouped.device)]


def _stack(values: Sequence[Tensor], name: str) -> Tensor:
    """Rows beside each other; `[rows, time]` padded to the longest time.

    Raises:
        ValueError: If they differ in their number of dimensions.
    """
    last = values[-1]
    if len({value.dim() for value in values}) > 1:
        raise ValueError(f"rollouts cannot be joined: {name} has one number a row in some, and one a token in others")
    if last.dim() > 1:
        width = max(value.shape[1] for value in values)
        values = [F.pad(value, (0, width - value.shape[1])) for value in values]
    return torch.cat([value.to(last.device) for value in values])
