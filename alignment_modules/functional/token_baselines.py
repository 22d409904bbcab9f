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
def gradient_norms(token_logps: Tensor, collision: Tensor) -> Tensor:
    """Squared norm of the gradient of each token's log-probability in the logits: `1 - 2 p + sum p^2`.

    Args:
        token_logps: `[batch, time]`, log-probabilities of the tokens.
        collision: `[batch, time]`, `log sum p^2` of the distribution of each (`score(..., ask=["collision"])`).

    Returns:
        `[batch, time]`, from 0 to 2, without gradient.

    >>> gradient_norms(torch.tensor([[0.25, 0.9]]).log(), torch.tensor([[0.4, 0.82]]).log())
    tensor([[0.9000, 0.0200]])
    """
    check_same_shape(token_logps=token_logps, collision=collision)
    return (1 - 2 * token_logps.exp() + collision.exp()).clamp(min=0)


@torch.no_grad()
def optimal_token_advantages(returns: Tensor, norms: Tensor, mask: Tensor) -> Tensor:
    """Returns less the baseline of least variance at each of a group's tokens (OTB, arXiv:2602.07078).

    `W_it` is the sum of completion i's `gradient_norms` up to its t-th own token. The baseline is `B_t =
    sum(W_it G_it) / sum(W_it)` over the completions i that have a t-th own token, and 0 where only one has: it would be
    compared with itself. Where a group's returns at t lie within 1e-6 of each other, their advantages are exactly 0; so
    are all of a group whose returns do so at every token.

    Args:
        returns: `[prompts, G, time]`, what is still to come (`returns_to_go`).
        norms: `[prompts, G, time]`, see `gradient_norms`.
        mask: `[prompts, G, time]`, bool or 0/1: own tokens of the completions with a reward.

    Returns:
        `[prompts, G, time]` float64, 0 outside the mask; without gradient.

    Raises:
        ValueError: If shapes differ.

    >>> returns, norms = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), torch.tensor([[[0.5, 0.5], [0.9, 0.02]]])
    >>> optimal_token_advantages(returns, norms, torch.ones(1, 2, 2))[0, 1].float()
    tensor([-0.3571, -0.5208])
    """
    check_same_shape(returns=returns, norms=norms, mask=mask)
    mask = mask.bool()
    # The policy's own tokens side by side: what others wrote between them is no step of the policy.
    order = (~mask).long().argsort(dim=-1, stable=True)
    there = mask.gather(-1, order)
    gain, norm = (torch.where(there, values.double().gather(-1, order), 0.0) for values in (returns, norms))
    weight = torch.where(there, norm.cumsum(dim=-1) + SMALLEST_WEIGHT, 0.0)
    sums = (weight * gain).sum(dim=1, keepdim=True), weight.sum(dim=1, keepdim=True)
    several = there.sum(dim=1, keepdim=True) > 1
    baseline = torch.where(several, sums[0] / sums[1].clamp(min=SMALLEST_WEIGHT), 0.0)
    known = torch.where(there, gain, torch.nan)
    equal = (several & nearly_equal(known, dim=1)) | nearly_equal(known.flatten(1), dim=1)[..., None]
    found = torch.where(there & ~equal, gain - baseline, 0.0)
    return torch.zeros_like(found).scatter(-1, order, found)
