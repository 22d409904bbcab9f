"""What is still to come at each turn of an episode, and from turns back to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from alignment_modules.functional.checks import check_same_shape
from alignment_modules.functional.value import turn_starts


@torch.no_grad()
def turn_returns(rewards: Tensor, turn_rewards: Tensor, mask: Tensor, penalty: Tensor | None = None) -> Tensor:
    """The return of each turn, without discount: an episode's reward less what earlier turns were given.

    With `r_j` the reward of turn j, what is not of a single turn counted to the last one, it is `R_k = sum over j >= k
    of r_j`, the turn's return of GTPO (arXiv:2511.14846) at discount 1. `R_1` is the reward of the episode.

    Args:
        rewards: `[batch]`, of whole episodes, turns included; NaN: not applicable.
        turn_rewards: `[batch, time]`, the part that single turns were given, anywhere within them.
        mask: `[batch, time]`, bool or 0/1: the policy's own tokens; each run of them is a turn.
        penalty: `[batch, time]`, taken from the turns that it falls into, such as `beta * k1`; its content outside the
            mask has no influence. None: 0.

    Returns:
        `[batch, turns]` float64, as wide as the longest episode; NaN where an episode has no such turn or no reward.

    Raises:
        ValueError: If shapes do not fit.

    >>> turn_returns(torch.tensor([1.0]), torch.tensor([[0.25, 0.0, 0.5]]), torch.tensor([[1, 0, 1]])).tolist()
    [[1.0, 0.75]]
    """
    check_same_shape(rewards=rewards, first_column_of_mask=mask[:, 0] if mask.shape[1] else rewards)
    check_same_shape(mask=mask, turn_rewards=turn_rewards)
    given = turn_sums(turn_rewards, mask)
    returns = rewards.double()[:, None] - (given.cumsum(dim=1) - given)
    if penalty is not None:
        check_same_shape(mask=mask, penalty=penalty)
        returns = returns - turn_sums(penalty, mask).flip(1).cumsum(dim=1).flip(1)
    turns = turn_starts(mask).sum(dim=1, keepdim=True)
    return returns.masked_fill(torch.arange(returns.shape[1], device=mask.device) >= turns, torch.nan)


def turn_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Sums over the tokens of each turn: `[batch, turns]` float64, as wide as the longest episode.

    Args:
        values: `[batch, time]`; its content outside the mask has no influence.
        mask: `[batch, time]`, bool or 0/1: each run of it is a turn.

    >>> turn_sums(torch.tensor([[1.0, 2.0, 9.0, 4.0]]), torch.tensor([[1, 1, 0, 1]])).tolist()
    [[3.0, 4.0]]
    """
    mask, starts = mask.bool(), turn_starts(mask)
    width = int(starts.sum(dim=1).max()) if len(mask) else 0
    if not width:
        return values.new_zeros(len(mask), 0, dtype=torch.float64)
    turn = (starts.cumsum(dim=1) - 1).clamp(min=0)
    empty = values.new_zeros(len(mask), width, dtype=torch.float64)
    return empty.scatter_add(1, turn, torch.where(mask, values.double(), 0.0))


def over_turns(values: Tensor, mask: Tensor) -> Tensor:
    """Every token of a turn with the turn's value: `[batch, time]`, 0 outside the mask.

    Args:
        values: `[batch, turns]`, at least as wide as the longest episode.
        mask: `[batch, time]`, bool or 0/1: each run of it is a turn.

    >>> over_turns(torch.tensor([[3.0, 4.0]]), torch.tensor([[1, 1, 0, 1]])).tolist()
    [[3.0, 3.0, 0.0, 4.0]]
    """
    mask = mask.bool()
    if not values.shape[1]:
        return values.new_zeros(mask.shape)
    turn = (turn_starts(mask).cumsum(dim=1) - 1).clamp(min=0)
    return torch.where(mask, values.gather(1, turn), 0.0)
