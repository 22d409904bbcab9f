"""Advantages from rewards that are compared within a group of completions."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from alignment_modules.functional.checks import check_choice, check_same_shape
from alignment_modules.functional.ranges import NonNegative, Range, check_options

ADVANTAGE_SCALES = ("group", "batch", "batch_tokens", "none", "leave_one_out", "mean")
"""Names that `group_advantages` takes."""

EQUAL_REWARDS = 1e-6
"""Rewards whose range is below this count as equal: their advantages are exactly 0."""


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    *,
    scale: str = "group",
    lengths: Tensor | None = None,
    ddof: Annotated[int, Range(0, 1)] = 1,
    eps: NonNegative = 0.0,
) -> Tensor:
    """Advantage of each completion over its group, where `mu` and `sigma` are the group's mean and deviation.

    | scale | advantage | source |
    |---|---|---|
    | `group` | `(r - mu) / sigma` | GRPO, arXiv:2402.03300 |
    | `batch` | `(r - mu) / sigma of all rewards` | Lite PPO, arXiv:2508.08221 |
    | `batch_tokens` | `c = r - mu`, whitened over all tokens | REINFORCE++-baseline, arXiv:2501.03262 |
    | `none` | `r - mu` | Dr. GRPO, arXiv:2503.20783 |
    | `leave_one_out` | `r - mean of the others` | RLOO, arXiv:2402.14740 |
    | `mean` | `(r - mu) / mu`, 0 where `mu <= 0` | MaxRL, arXiv:2602.02710 |

    All is computed in float64. A group whose rewards lie within 1e-6 of each other gets exactly 0: rounding residues
    divided by a rounding residue of a deviation would otherwise be of order 1. The tokens of `batch_tokens` are
    those of all completions with a reward, each holding its completion's `c`; a group of equal rewards counts among
    them and still gets 0.

    Args:
        rewards: `[prompts, G]`. NaN: not applicable; it is left out of its group and gets advantage 0.
        scale: One of `ADVANTAGE_SCALES`.
        lengths: `[prompts, G]`, tokens of each completion; needed by `batch_tokens` and by no other.
        ddof: 1: sample deviation (divides by the count less 1), 0: population deviation.
        eps: Added to the deviation; not needed for stability.

    Returns:
        `[prompts, G]`, float32, or float64 for float64 rewards; without gradient.

    Raises:
        ValueError: If rewards are not `[prompts, G]` with G > 1, are infinite, or an option is not allowed.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]]), scale="none")
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    check_choice("scale", scale, ADVANTAGE_SCALES)
    check_options(group_advantages, locals())
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [prompts, G], got shape {tuple(rewards.shape)}")
    if rewards.shape[1] < 2:
        raise ValueError(
            "rewards must be [prompts, G] with G >= 2, because a prompt's completions are compared with each other, "
            f"got G={rewards.shape[1]}"
        )
    if rewards.isinf().any():
        raise ValueError("rewards must be finite, or NaN where they do not apply, got an infinite one")
    if (lengths is not None) != (scale == "batch_tokens"):
        wrong = "needs lengths, the tokens of each completion" if lengths is None else "reads no lengths"
        raise ValueError(f"scale={scale!r} {wrong}")
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    applies = ~rewards.isnan()
    exact = rewards.double()
    count = applies.sum(dim=1, keepdim=True)
    mean = exact.nansum(dim=1, keepdim=True) / count.clamp(min=1)
    signal = applies & ~_equal(exact, dim=1)
    centred = torch.where(signal, exact - mean, 0.0)
    if scale == "group":
        centred = _divide(centred, _deviation(centred, count, ddof, dim=1), eps)
    elif scale == "batch":
        flat = exact[applies][None]
        spread = torch.where(_equal(flat, dim=1), 0.0, flat - flat.mean(dim=1, keepdim=True))
        centred = _divide(centred, _deviation(spread, applies.sum(), ddof, dim=1), eps)
    elif scale == "batch_tokens":
        check_same_shape(rewards=rewards, lengths=lengths)  # type: ignore[arg-type]
        tokens = torch.where(applies, lengths.double(), 0.0)  # type: ignore[union-attr]
        count = tokens.sum()
        spread = centred - (tokens * centred).sum() / count.clamp(min=1)
        deviation = ((tokens * spread.square()).sum() / (count - ddof).clamp(min=1)).sqrt()
        centred = torch.where(signal, _divide(spread, deviation, eps), 0.0)
    elif scale == "leave_one_out":
        centred = centred * count / (count - 1).clamp(min=1)
    elif scale == "mean":
        centred = _divide(centred, mean.clamp(min=0.0), 0.0)
    return centred.to(dtype)


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
    return ~_equal(rewards.double(), dim=1).squeeze(1)


def _equal(rewards: Tensor, dim: int) -> Tensor:
    """Whether the rewards that apply are equal up to rounding; true where none applies."""
    if rewards.shape[dim] == 0:
        return torch.ones_like(rewards.sum(dim=dim, keepdim=True), dtype=torch.bool)
    highest = rewards.nan_to_num(nan=-torch.inf).amax(dim=dim, keepdim=True)
    lowest = rewards.nan_to_num(nan=torch.inf).amin(dim=dim, keepdim=True)
    return highest - lowest < EQUAL_REWARDS


def _deviation(centred: Tensor, count: Tensor, ddof: int, dim: int) -> Tensor:
    return (centred.square().sum(dim=dim, keepdim=True) / (count - ddof).clamp(min=1)).sqrt()


def _divide(numerator: Tensor, denominator: Tensor, eps: float) -> Tensor:
    """0 where the denominator is 0, whatever the numerator."""
    return torch.where(denominator > 0, numerator / (denominator + eps), 0.0)
