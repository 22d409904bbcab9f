"""Advantages from rewards: compared within a group of completions, or estimated over time with a critic."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from alignment_modules.functional.checks import check_choice, check_same_shape
from alignment_modules.functional.ranges import NonNegative, Range, Share, check_options

ADVANTAGE_SCALES = ("group", "batch", "none", "leave_one_out", "mean")
"""Names that `group_advantages` takes."""

EQUAL_REWARDS = 1e-6
"""Rewards whose range is below this count as equal: their advantages are exactly 0."""


@torch.no_grad()
def group_advantages(
    rewards: Tensor, *, scale: str = "group", ddof: Annotated[int, Range(0, 1)] = 1, eps: NonNegative = 0.0
) -> Tensor:
    """Advantage of each completion over its group, where `mu` and `sigma` are the group's mean and deviation.

    | scale | advantage | source |
    |---|---|---|
    | `group` | `(r - mu) / sigma` | GRPO, arXiv:2402.03300 |
    | `batch` | `(r - mu) / sigma of all rewards` | REINFORCE++-baseline, arXiv:2501.03262 |
    | `none` | `r - mu` | Dr. GRPO, arXiv:2503.20783 |
    | `leave_one_out` | `r - mean of the others` | RLOO, arXiv:2402.14740 |
    | `mean` | `(r - mu) / mu`, 0 where `mu <= 0` | MaxRL, arXiv:2602.02710 |

    All is computed in float64. A group whose rewards lie within 1e-6 of each other gets exactly 0: rounding residues
    divided by a rounding residue of a deviation would otherwise be of order 1.

    Args:
        rewards: `[prompts, G]`. NaN: not applicable; it is left out of its group and gets advantage 0.
        scale: One of `ADVANTAGE_SCALES`.
        ddof: 1: sample deviation (divides by G - 1), 0: population deviation.
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
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    applies = ~rewards.isnan()
    exact = rewards.double()
    count = applies.sum(dim=1, keepdim=True)
    mean = exact.nansum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(applies & ~_equal(exact, dim=1), exact - mean, 0.0)
    if scale == "group":
        centred = _divide(centred, _deviation(centred, count, ddof, dim=1), eps)
    elif scale == "batch":
        flat = exact[applies][None]
        spread = torch.where(_equal(flat, dim=1), 0.0, flat - flat.mean(dim=1, keepdim=True))
        centred = _divide(centred, _deviation(spread, applies.sum(), ddof, dim=1), eps)
    elif scale == "leave_one_out":
        centred = centred * count / (count - 1).clamp(min=1)
    elif scale == "mean":
        centred = _divide(centred, mean.clamp(min=0.0), 0.0)
    return centred.to(dtype)


@torch.no_grad()
def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: Share = 1.0,
    lam: Share = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv:1506.02438, eq. 16) over the positions in the mask.

    `delta_t = r_t + gamma V_{t+1} - V_t` and `A_t = delta_t + gamma lam A_{t+1}`, where `t + 1` is the next position in
    the mask: padding and tokens of tools between two positions neither discount nor reset anything.

    Args:
        rewards: `[batch, time]`, the reward of each position. What stands outside the mask is ignored: put a
            sequence's score on its last position in the mask.
        values: `[batch, time]`, the critic's values `V_t` before the position's token.
        mask: `[batch, time]`, bool or 0/1: the policy's own tokens.
        gamma: Discount, in [0, 1].
        lam: Trade of bias (0) for variance (1), in [0, 1].
        bootstrap: `[batch]`, value after the last position; None: 0, right for sequences that ended by themselves.

    Returns:
        `(advantages, returns)`, each `[batch, time]` and 0 outside the mask, without gradient. `returns` is
        `advantages + values`, the critic's target; whiten the advantages afterwards, if at all.

    Raises:
        ValueError: If shapes differ or `gamma` or `lam` is outside [0, 1].

    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.5]])
    >>> generalized_advantages(rewards, values, torch.tensor([[1, 0, 1]]), lam=1.0)[0]
    tensor([[0.5000, 0.0000, 0.5000]])
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    check_options(generalized_advantages, locals())
    mask = mask.bool()
    advantages = torch.zeros_like(values)
    next_value = values.new_zeros(values.shape[0]) if bootstrap is None else bootstrap.to(values.dtype)
    check_same_shape(first_column_of_values=values[:, 0] if values.shape[1] else next_value, bootstrap=next_value)
    following = torch.zeros_like(next_value)
    for time in range(values.shape[1] - 1, -1, -1):
        here = mask[:, time]
        delta = rewards[:, time] + gamma * next_value - values[:, time]
        following = torch.where(here, delta + gamma * lam * following, following)
        next_value = torch.where(here, values[:, time], next_value)
        advantages[:, time] = torch.where(here, following, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


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
