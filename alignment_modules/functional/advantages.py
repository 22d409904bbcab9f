"""Advantages of whole completions: what is subtracted from a reward, and what the difference is divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from alignment_modules.functional.checks import check_choice, check_same_shape
from alignment_modules.functional.ranges import NonNegative, Range, check_options

BASELINES: dict[str, tuple[str, ...]] = {
    "group": ("group", "batch", "batch_tokens", "none", "mean"),
    "leave_one_out": ("none", "group", "batch", "batch_tokens"),
    "length_weighted": ("none", "group", "batch", "batch_tokens"),
    "pass_at_k": ("none", "group", "batch", "batch_tokens"),
    "greedy": ("none", "batch_tokens"),
    "none": ("none", "batch_tokens"),
    "optimal_token": ("none", "batch_tokens"),
}
"""What may be subtracted, and the scales that go with each; the first is that of its paper."""

ADVANTAGE_SCALES = ("group", "batch", "batch_tokens", "none", "leave_one_out", "mean")
"""What an advantage may be divided by. "leave_one_out" is the baseline of that name, divided by nothing."""

AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
"""How several rewards make one: their weighted sum, or the weighted sum of what each is in its group (GDPO)."""

UNGROUPED = ("greedy", "none")
"""Baselines that compare no completion with the others of its prompt, of which one is then enough."""

EQUAL_REWARDS = 1e-6
"""Rewards whose range is below this count as equal: their advantages are exactly 0."""


@dataclass(frozen=True)
class AdvantageEstimator:
    """How rewards become advantages, as one value that checks itself.

    Args:
        scale_rewards: One of `ADVANTAGE_SCALES`; None: the baseline's first in `BASELINES`, for "normalize_then_sum"
            "batch". Resolved on construction.
        baseline: A key of `BASELINES`; None: "group", or "leave_one_out" where `scale_rewards` says so. Resolved on
            construction.
        multi_objective_aggregation: One of `AGGREGATIONS`.

    Raises:
        ValueError: If an option is unknown, or they contradict each other.

    >>> AdvantageEstimator("leave_one_out").baseline, AdvantageEstimator(baseline="greedy").scale_rewards
    ('leave_one_out', 'none')
    """

    scale_rewards: str | None = None
    baseline: str | None = None
    multi_objective_aggregation: str = "sum_then_normalize"

    def __post_init__(self) -> None:
        check_choice("multi_objective_aggregation", self.multi_objective_aggregation, AGGREGATIONS)
        if self.scale_rewards is not None:
            check_choice("scale_rewards", self.scale_rewards, ADVANTAGE_SCALES)
        if self.baseline is not None:
            check_choice("baseline", self.baseline, BASELINES)
        scale, baseline = _resolve(self.scale_rewards, self.baseline, "scale_rewards")
        if self.decoupled:
            allowed = ("batch", "batch_tokens", "none")
            if baseline != "group" or (scale or "batch") not in allowed:
                raise ValueError(
                    "multi_objective_aggregation='normalize_then_sum' compares each reward with its group and then "
                    f"takes baseline='group' and one of scale_rewards {', '.join(map(repr, allowed))}, got "
                    f"baseline={baseline!r}, scale_rewards={scale!r}"
                )
            scale = scale or "batch"
        object.__setattr__(self, "baseline", baseline)
        object.__setattr__(self, "scale_rewards", scale or BASELINES[baseline][0])

    @property
    def decoupled(self) -> bool:
        """Whether each reward is normalised by itself."""
        return self.multi_objective_aggregation == "normalize_then_sum"

    @property
    def grouped(self) -> bool:
        """Whether a completion is compared with the others of its prompt."""
        return self.baseline not in UNGROUPED

    @property
    def to_go(self) -> bool:
        """Whether a token's advantage counts what is still to come alone, where each token has a reward of its own."""
        return self.baseline in (*UNGROUPED, "optimal_token")

    @property
    def reads_lengths(self) -> bool:
        """Whether the lengths of completions matter."""
        return self.scale_rewards == "batch_tokens" or self.baseline == "length_weighted"

    @property
    def spans_batch(self) -> bool:
        """Whether the completions of other prompts matter."""
        return self.scale_rewards in ("batch", "batch_tokens")

    def describe(self) -> str:
        """The estimator in words."""
        less = {
            "group": "less the group's mean",
            "leave_one_out": "less the mean of the group's others",
            "length_weighted": "less the group's mean weighted by length (OPO)",
            "pass_at_k": "of the group's best, less the second best (pass@k)",
            "greedy": "less that of a greedy completion (ReMax)",
            "none": "as it is",
            "optimal_token": "to go, less the optimal token baseline (OTB)",
        }[str(self.baseline)]
        by = {
            "group": ", divided by the group's deviation",
            "batch": ", divided by the deviation of all rewards of the rollout",
            "batch_tokens": ", whitened over all tokens of the rollout",
            "none": "",
            "mean": ", divided by the group's mean",
        }[str(self.scale_rewards)]
        return ("sum of rewards, each normalised in its group (GDPO), " if self.decoupled else "reward ") + less + by

    def __call__(
        self, rewards: Tensor, *, lengths: Tensor | None = None, greedy_rewards: Tensor | None = None
    ) -> Tensor:
        """`group_advantages` with these options, given what they read; of a baseline that is one of a completion."""
        return group_advantages(
            rewards,
            scale=str(self.scale_rewards),
            baseline=self.baseline,
            lengths=lengths if self.reads_lengths else None,
            greedy_rewards=greedy_rewards if self.baseline == "greedy" else None,
        )


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    *,
    scale: str = "group",
    baseline: str | None = None,
    lengths: Tensor | None = None,
    greedy_rewards: Tensor | None = None,
    ddof: Annotated[int, Range(0, 1)] = 1,
    eps: NonNegative = 0.0,
) -> Tensor:
    """Advantage of each completion: its reward less a baseline, scaled.

    With the mean `mu` and the deviation `sigma` of a prompt's group of G rewards:

    | baseline | centred reward `c` | source |
    |---|---|---|
    | `group` | `r - mu` | GRPO, arXiv:2402.03300 |
    | `leave_one_out` | `r - mean of the others` | RLOO, arXiv:2402.14740 |
    | `length_weighted` | `r - sum(length r) / sum(length)` | OPO, arXiv:2505.23585 |
    | `pass_at_k` | `r - second best` for the best, 0 for the others | arXiv:2503.19595, leave-one-out of the maximum |
    | `greedy` | `r - reward of a greedy completion` | ReMax, arXiv:2310.10505 |
    | `none` | `r` | REINFORCE |

    | scale | advantage | source |
    |---|---|---|
    | `group` | `c / sigma` | GRPO, arXiv:2402.03300 |
    | `batch` | `c / sigma of all rewards` | Lite PPO, arXiv:2508.08221 |
    | `batch_tokens` | `c` whitened over all tokens | REINFORCE++ (baseline `none` or `group`), arXiv:2501.03262 |
    | `none` | `c` | Dr. GRPO, arXiv:2503.20783 |
    | `mean` | `c / mu`, 0 where `mu <= 0` | MaxRL, arXiv:2602.02710 |

    All is computed in float64. A group that is compared and whose rewards lie within 1e-6 of each other gets exactly 0:
    rounding residues divided by a rounding residue of a deviation would otherwise be of order 1. The tokens of
    `batch_tokens` are those of all completions with a reward, each holding its completion's `c`; a group of equal
    rewards counts among them and still gets 0.

    Args:
        rewards: `[prompts, G]`. NaN: not applicable; it is left out of its group and gets advantage 0.
        scale: One of `ADVANTAGE_SCALES`, of those that `BASELINES` names with the baseline. "leave_one_out" is short
            for that baseline with "none".
        baseline: A key of `BASELINES` but "optimal_token" (see `optimal_token_advantages`); None: "group".
        lengths: `[prompts, G]`, tokens of each completion; needed by "batch_tokens" and "length_weighted" alone.
        greedy_rewards: `[prompts]`, needed by "greedy" alone; NaN: not applicable, and neither are the prompt's.
        ddof: 1: sample deviation (divides by the count less 1), 0: population deviation.
        eps: Added to the deviation; not needed for stability.

    Returns:
        `[prompts, G]`, float32, or float64 for float64 rewards; without gradient.

    Raises:
        ValueError: If rewards are not `[prompts, G]` with G > 1 (1 where none is compared with another), are infinite,
            or an option is not allowed.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]]), scale="none")
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    check_choice("scale", scale, ADVANTAGE_SCALES)
    if baseline is not None:
        check_choice("baseline", baseline, [name for name in BASELINES if name != "optimal_token"])
    check_options(group_advantages, locals())
    resolved, baseline = _resolve(scale, baseline, "scale")
    scale = str(resolved)
    _check_rewards(rewards, compared=baseline not in UNGROUPED)
    weighted = baseline == "length_weighted"
    reader = f"baseline={baseline!r}" if weighted else f"scale={scale!r}"
    _check_given("lengths", lengths, weighted or scale == "batch_tokens", reader)
    _check_given("greedy_rewards", greedy_rewards, baseline == "greedy", f"baseline={baseline!r}")
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    exact = rewards.double()
    if greedy_rewards is not None:
        check_same_shape(first_rewards=rewards[:, 0], greedy_rewards=greedy_rewards)
        exact = exact - greedy_rewards.double()[:, None]
    tokens = None
    if lengths is not None:
        check_same_shape(rewards=rewards, lengths=lengths)
        tokens = torch.where(exact.isnan(), 0.0, lengths.double())
    centred, signal = _centred(exact, baseline, tokens)
    return torch.where(signal, _scaled(centred, exact, scale, tokens, ddof, eps), 0.0).to(dtype)


@torch.no_grad()
def decoupled_rewards(
    rewards: Tensor, weights: Tensor, *, ddof: Annotated[int, Range(0, 1)] = 1, eps: NonNegative = 0.0
) -> Tensor:
    """Weighted sum of rewards, each of which was normalised in its group first (GDPO, arXiv:2601.05242).

    `group_advantages(..., scale="batch")` of it are that paper's advantages: the sum's mean is 0 in each group.

    Args:
        rewards: `[prompts, G, rewards]`; NaN: not applicable.
        weights: `[rewards]`.
        ddof: As in `group_advantages`.
        eps: As in `group_advantages`.

    Returns:
        `[prompts, G]` in the dtype of `group_advantages`; NaN where no reward applies.

    Raises:
        ValueError: If shapes do not fit, or as `group_advantages`.

    >>> decoupled_rewards(torch.tensor([[[1.0, 10.0], [0.0, 30.0]]]), torch.tensor([1.0, 0.5]))
    tensor([[ 0.3536, -0.3536]])
    """
    if rewards.dim() != 3 or weights.shape != rewards.shape[2:]:
        raise ValueError(
            "rewards must be [prompts, G, rewards] with one weight each, got shapes "
            f"{tuple(rewards.shape)} and {tuple(weights.shape)}"
        )
    parts = [group_advantages(one, scale="group", ddof=ddof, eps=eps) for one in rewards.unbind(dim=2)]
    total = torch.stack(parts, dim=2) @ weights.to(parts[0].dtype)
    return total.masked_fill(rewards.isnan().all(dim=2), torch.nan)


@torch.no_grad()
def informative_groups(rewards: Tensor) -> Tensor:
    """Which groups can teach something: two of their rewards differ by 1e-6 or more.

    Args:
        rewards: `[prompts, G]`. NaN: not applicable.

    Returns:
        `[prompts]` bool.

    >>> informative_groups(torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, torch.nan]]))
    tensor([ True, False, False])
    """
    return ~nearly_equal(rewards.double(), dim=1).squeeze(1)


def nearly_equal(values: Tensor, dim: int) -> Tensor:
    """Whether the numbers of a dimension, which is kept, are equal up to rounding; NaN is none of them.

    Args:
        values: Of any shape; true where a row holds none.
        dim: The dimension.
    """
    if values.shape[dim] == 0:
        return torch.ones_like(values.sum(dim=dim, keepdim=True), dtype=torch.bool)
    highest = values.nan_to_num(nan=-torch.inf).amax(dim=dim, keepdim=True)
    lowest = values.nan_to_num(nan=torch.inf).amin(dim=dim, keepdim=True)
    return highest - lowest < EQUAL_REWARDS


def _resolve(scale: str | None, baseline: str | None, option: str) -> tuple[str | None, str]:
    """Scale and baseline with what the short form "leave_one_out" stands for; the scale may still be None."""
    if scale == "leave_one_out":
        if baseline not in (None, "leave_one_out"):
            raise ValueError(f"{option}='leave_one_out' is a baseline itself and contradicts baseline={baseline!r}")
        return "none", "leave_one_out"
    baseline = baseline or "group"
    if scale is not None and scale not in BASELINES[baseline]:
        raise ValueError(
            f"{option}={scale!r} does not go with baseline={baseline!r}: it takes one of "
            f"{', '.join(map(repr, BASELINES[baseline]))}"
        )
    return scale, baseline


def _check_rewards(rewards: Tensor, *, compared: bool) -> None:
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [prompts, G], got shape {tuple(rewards.shape)}")
    if rewards.shape[1] < 1 + compared:
        raise ValueError(
            f"rewards must be [prompts, G] with G >= {1 + compared}"
            + (", because a prompt's completions are compared with each other" if compared else "")
            + f", got G={rewards.shape[1]}"
        )
    if rewards.isinf().any():
        raise ValueError("rewards must be finite, or NaN where they do not apply, got an infinite one")


def _check_given(name: str, value: Tensor | None, needed: bool, by: str) -> None:
    if (value is not None) != needed:
        raise ValueError(f"{by} {'needs' if needed else 'reads no'} {name}")


def _centred(rewards: Tensor, baseline: str, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards less their baseline, 0 where they teach nothing, and where they teach something; `[prompts, G]` each."""
    applies = ~rewards.isnan()
    if baseline in UNGROUPED:
        return torch.where(applies, rewards, 0.0), applies
    signal = applies & ~nearly_equal(rewards, dim=1)
    count = applies.sum(dim=1, keepdim=True)
    if baseline == "pass_at_k":
        best = rewards.nan_to_num(nan=-torch.inf).topk(2, dim=1).values
        gain = torch.where(count > 1, best[:, :1] - best[:, 1:], 0.0)
        return torch.where(signal & (rewards == best[:, :1]), gain, 0.0), signal
    mean = rewards.nansum(dim=1, keepdim=True) / count.clamp(min=1)
    if baseline == "length_weighted" and tokens is not None:
        sums = (tokens * rewards.nan_to_num()).sum(dim=1, keepdim=True), tokens.sum(dim=1, keepdim=True)
        mean = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1), mean)
    centred = torch.where(signal, rewards - mean, 0.0)
    if baseline == "leave_one_out":
        centred = centred * count / (count - 1).clamp(min=1)
    return centred, signal


def _scaled(centred: Tensor, rewards: Tensor, scale: str, tokens: Tensor | None, ddof: int, eps: float) -> Tensor:
    """Centred rewards divided as `scale` says; `[prompts, G]` all."""
    applies = ~rewards.isnan()
    count = applies.sum(dim=1, keepdim=True)
    mean = rewards.nansum(dim=1, keepdim=True) / count.clamp(min=1)
    if scale == "group":
        spread = torch.where(applies & ~nearly_equal(rewards, dim=1), rewards - mean, 0.0)
        return _divide(centred, _deviation(spread, count, ddof, dim=1), eps)
    if scale == "batch":
        flat = rewards[applies][None]
        spread = torch.where(nearly_equal(flat, dim=1), 0.0, flat - flat.mean(dim=1, keepdim=True))
        return _divide(centred, _deviation(spread, applies.sum(), ddof, dim=1), eps)
    if scale == "batch_tokens" and tokens is not None:
        written = torch.where(tokens > 0, centred, torch.nan).flatten()
        total = tokens.sum()
        spread = centred - (tokens * centred).sum() / total.clamp(min=1)
        deviation = ((tokens * spread.square()).sum() / (total - ddof).clamp(min=1)).sqrt()
        return torch.where(nearly_equal(written, dim=0), 0.0, _divide(spread, deviation, eps))
    return _divide(centred, mean.clamp(min=0.0), 0.0) if scale == "mean" else centred


def _deviation(centred: Tensor, count: Tensor, ddof: int, dim: int) -> Tensor:
    return (centred.square().sum(dim=dim, keepdim=True) / (count - ddof).clamp(min=1)).sqrt()


def _divide(numerator: Tensor, denominator: Tensor, eps: float) -> Tensor:
    """0 where the denominator is 0, whatever the numerator."""
    return torch.where(denominator > 0, numerator / (denominator + eps), 0.0)
