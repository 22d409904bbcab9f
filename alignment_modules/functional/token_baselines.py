"""Advantages of single tokens without a critic: rewards still to come, and what they are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from alignment_modules.functional.advantages import nearly_equal
from alignment_modules.functional.checks import check_same_shape

SMALLEST_WEIGHT = 1e-30
"""Added to each weight of `optimal_token_advantages`: tokens that were certain weigh alike, not 0 / 0."""


@torch.no_grad()
def returns_to_go(rewards: Tensor, mask: Tensor, penalty: Tensor | None = None) -> Tensor:
    """What is still to come at each token: the completion's reward, which stands at its last token, less penalties.

    Without discount, as in REINFORCE++ (arXiv:2501.03262) and ReMax (arXiv:2310.10505) for language models: `G_t = r -
    sum over s >= t of penalty_s`. Tokens outside the mask cost nothing.

    Args:
        rewards: `[batch]`; NaN: not applicable.
        mask: `[batch, time]`, bool or 0/1: the policy's own tokens.
        penalty: `[batch, time]`, such as `beta * k1`; its content outside the mask has no influence. None: 0.

    Returns:
        `[batch, time]` float64, 0 outside the mask and where the reward is not applicable; without gradient.

    Raises:
        ValueError: If shapes do not fit.

    >>> returns_to_go(torch.tensor([1.0]), torch.tensor([[1, 0, 1]]), torch.tensor([[0.25, 9.0, 0.5]])).tolist()
    [[0.25, 0.0, 0.5]]
    """
    check_same_shape(rewards=rewards, first_column_of_mask=mask[:, 0] if mask.shape[1] else rewards)
    mask = mask.bool() & ~rewards.isnan()[:, None]
    returns = rewards.double()[:, None].expand(mask.shape)
    if penalty is not None:
        check_same_shape(mask=mask, penalty=penalty)
        costs = torch.where(mask, penalty.double(), 0.0)
        returns = returns - costs.flip(1).cumsum(1).flip(1)
    return torch.where(mask, returns, 0.0)


@torch.no_grad()
def optimal_token_advantages(returns: Tensor, token_logps: Tensor, collision: Tensor, mask: Tensor) -> Tensor:
    """Returns less the baseline of least variance at each of a group's tokens (OTB, arXiv:2602.07078).

    At the t-th own token of completion i the squared norm of the gradient of its log-probability in the logits is `1 -
    2 p + sum p^2`, and `W_it` the sum of it up to t. The baseline is `B_t = sum_i W_it G_it / sum_i W_it` over the
    completions that have a t-th own token, and 0 where only one has: it would be compared with itself. Where a group's
    returns at t lie within 1e-6 of each other, their advantages are exactly 0; so are all of a group whose returns do
    so at every token.

    Args:
        returns: `[prompts, G, time]`, what is still to come (`returns_to_go`).
        token_logps: `[prompts, G, time]`, log-probabilities of the tokens.
        collision: `[prompts, G, time]`, `log sum p^2` of the distribution of each (`score(..., ask=["collision"])`).
        mask: `[prompts, G, time]`, bool or 0/1: own tokens of the completions with a reward.

    Returns:
        `[prompts, G, time]` float64, 0 outside the mask; without gradient.

    Raises:
        ValueError: If shapes differ.

    >>> p, both = torch.tensor([[[0.5, 0.5], [0.25, 0.9]]]), torch.tensor([[[0.5, 0.5], [0.4, 0.82]]]).log()
    >>> returns = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    >>> optimal_token_advantages(returns, p.log(), both, torch.ones(1, 2, 2))[0, 1].float()
    tensor([-0.3571, -0.5208])
    """
    check_same_shape(returns=returns, token_logps=token_logps, collision=collision, mask=mask)
    mask = mask.bool()
    # The policy's own tokens side by side: what others wrote between them is no step of the policy.
    order = (~mask).long().argsort(dim=-1, stable=True)
    there = mask.gather(-1, order)
    gain, logps, both = (values.double().gather(-1, order) for values in (returns, token_logps, collision))
    norm = torch.where(there, 1 - 2 * logps.exp() + both.exp(), 0.0).clamp(min=0)
    weight = torch.where(there, norm.cumsum(dim=-1) + SMALLEST_WEIGHT, 0.0)
    gain = torch.where(there, gain, torch.nan)
    baseline = (weight * gain.nan_to_num()).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(
        min=SMALLEST_WEIGHT
    )
    several = there.sum(dim=1, keepdim=True) > 1
    equal = several & nearly_equal(gain, dim=1)
    nothing = nearly_equal(gain.flatten(1), dim=1)[..., None]
    found = torch.where(there & ~equal & ~nothing, gain - torch.where(several, baseline, 0.0), 0.0)
    return torch.zeros_like(found).scatter(-1, order, found)
