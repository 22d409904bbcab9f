"""What a critic takes part in: generalized advantages over time, how they are whitened, and the critic's loss."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from alignment_modules.functional.advantages import EQUAL_REWARDS
from alignment_modules.functional.checks import check_same_shape
from alignment_modules.functional.ranges import Positive, Range, Share, check_options
from alignment_modules.functional.statistics import Statistic


@torch.no_grad()
def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: Share = 1.0,
    lam: Share | Tensor = 0.95,
    bootstrap: Tensor | None = None,
    unit: Literal["token", "turn"] = "token",
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
        lam: Trade of bias (0) for variance (1), in [0, 1]; or `[batch]`, one for each row, such as one that grows with
            its length (VAPO, arXiv:2504.05118).
        bootstrap: `[batch]`, value after the last position; None: 0, right for sequences that ended by themselves.
        unit: What one step in time is: a "token", or a "turn", a run of positions in the mask with others between it
            and the next. A turn has the sum of its rewards and the value before its first token, and all of its tokens
            have its advantage and return.

    Returns:
        `(advantages, returns)`, each `[batch, time]` and 0 outside the mask, without gradient. `returns` is
        `advantages + values`, the critic's target; whiten the advantages afterwards, if at all. A critic with a `lam`
        of its own takes the returns of a second call.

    Raises:
        ValueError: If shapes differ or `gamma` or `lam` is outside [0, 1].

    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.5]])
    >>> generalized_advantages(rewards, values, torch.tensor([[1, 0, 1]]), lam=1.0)[0]
    tensor([[0.5000, 0.0000, 0.5000]])
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    check_options(generalized_advantages, locals())
    if isinstance(lam, Tensor):
        if lam.shape != values.shape[:1]:
            raise ValueError(f"lam must be one number or [batch] = [{values.shape[0]}], got shape {tuple(lam.shape)}")
        if not bool(((lam >= 0) & (lam <= 1)).all()):
            raise ValueError(f"lam must be finite numbers from 0 to 1, got {lam.tolist()}")
        lam = lam.to(values)
    elif lam not in Range(0, 1):
        raise ValueError(f"lam={lam} must be a finite number from 0 to 1, or [batch] of them")
    mask = mask.bool()
    end = values.new_zeros(values.shape[0]) if bootstrap is None else bootstrap.to(values.dtype)
    check_same_shape(first_column_of_values=values[:, 0] if values.shape[1] else end, bootstrap=end)
    if unit == "token":
        return _over_time(rewards, values, mask, gamma, lam, end)
    starts = turn_starts(mask)
    turn = (starts.cumsum(dim=1) - 1).clamp(min=0)
    empty = values.new_zeros(len(values), (values.shape[1] + 1) // 2)  # no row has more turns
    turn_rewards, turn_values = (
        empty.scatter_add(1, turn, torch.where(place, given, 0.0))
        for place, given in ((mask, rewards), (starts, values))
    )
    there = torch.arange(empty.shape[1], device=values.device) < starts.sum(dim=1, keepdim=True)
    found = _over_time(turn_rewards, turn_values, there, gamma, lam, end)
    advantages, returns = (torch.where(mask, each.gather(1, turn), 0.0) for each in found)
    return advantages, returns


def token_rewards(scores: Tensor, mask: Tensor, penalty: Tensor | None = None) -> Tensor:
    """The reward of each token: its sequence's score at the last position in the mask, less a penalty of its own.

    Args:
        scores: `[batch]`.
        mask: `[batch, time]`, bool or 0/1: the policy's own tokens.
        penalty: `[batch, time]`, such as `beta` times the KL estimate k1 (arXiv:1909.08593, eq. 2); None: none.

    Returns:
        `[batch, time]`, 0 outside the mask; a sequence without a position in it has no reward.

    Raises:
        ValueError: If shapes differ.

    >>> token_rewards(torch.tensor([1.0]), torch.tensor([[1, 1, 0, 1, 0]]), torch.full((1, 5), 0.25))
    tensor([[-0.2500, -0.2500,  0.0000,  0.7500,  0.0000]])
    """
    mask = mask.bool()
    check_same_shape(first_column_of_mask=mask[:, 0] if mask.shape[1] else scores, scores=scores)
    last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
    rewards = torch.where(last, scores[:, None], torch.zeros_like(scores)[:, None])
    if penalty is None:
        return rewards
    check_same_shape(mask=mask, penalty=penalty)
    return torch.where(mask, rewards - penalty.to(rewards), 0.0)


def turn_starts(mask: Tensor) -> Tensor:
    """The first token of each turn, `[batch, time]` bool: a turn is a run of positions in the mask.

    Args:
        mask: `[batch, time]`, bool or 0/1.

    >>> turn_starts(torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])).int()
    tensor([[1, 0, 0, 1],
            [0, 1, 0, 0]], dtype=torch.int32)
    """
    starts = mask.bool().clone()
    starts[:, 1:] &= ~mask.bool()[:, :-1]
    return starts


def length_adaptive_lambda(lengths: Tensor, alpha: Positive) -> Tensor:
    """`clip(1 - 1 / max(alpha * length, 1), 0, 1)`, the lambda of the policy's advantages in VAPO (arXiv:2504.05118).

    With the paper's `alpha` of 0.05 it is 0, one-step TD, up to a length of 20.

    Args:
        lengths: `[batch]`, steps in time of each sequence.
        alpha: How fast lambda grows with the length.

    Returns:
        `[batch]` float32.

    Raises:
        ValueError: If `alpha` is not positive.

    >>> length_adaptive_lambda(torch.tensor([10, 20, 40, 200, 1000]), 0.05)
    tensor([0.0000, 0.0000, 0.5000, 0.9000, 0.9800])
    """
    check_options(length_adaptive_lambda, locals())
    return (1.0 - 1.0 / (alpha * lengths.float()).clamp(min=1.0)).clamp(0.0, 1.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Statistic:
    """How much of the variance of the returns the values explain, `1 - Var(R - V) / Var(R)`, as additive sums.

    1: all of it; 0: no more than a constant would; below 0: less.

    Args:
        values: `[batch, time]`, the critic's.
        returns: `[batch, time]`, what they stand for.
        mask: `[batch, time]`, bool or 0/1: what counts.

    Raises:
        ValueError: If shapes differ.
    """
    check_same_shape(values=values, returns=returns, mask=mask)
    mask = mask.bool()
    targets, errors = (torch.where(mask, x.detach().double(), 0.0) for x in (returns, returns - values))
    sums = [errors.sum(), errors.square().sum(), targets.sum(), targets.square().sum()]
    return Statistic(torch.stack(sums), mask.sum(), "explained")


def _over_time(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    advantages, next_value, following = torch.zeros_like(values), end, torch.zeros_like(end)
    for time in range(values.shape[1] - 1, -1, -1):
        here = mask[:, time]
        delta = rewards[:, time] + gamma * next_value - values[:, time]
        following = torch.where(here, delta + gamma * lam * following, following)
        next_value = torch.where(here, values[:, time], next_value)
        advantages[:, time] = torch.where(here, following, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, ddof: Annotated[int, Range(0, 1)] = 1) -> Tensor:
    """Values of deviation 1 and mean 0 over all positions in the mask.

    Give it all ranks' values: what is whitened piece by piece depends on how it was cut. Values that lie within 1e-6 of
    each other have no deviation to speak of: nothing is left of them but their mean.

    Args:
        values: `[batch, time]`; its content outside the mask has no influence.
        mask: `[batch, time]`, bool or 0/1.
        shift_mean: Whether the mean becomes 0; if not, it stays what it was.
        ddof: 1: sample deviation (divides by the count less 1), 0: population deviation.

    Returns:
        `[batch, time]`, 0 outside the mask, computed in float64 and given in the dtype of `values`.

    Raises:
        ValueError: If shapes differ or an option is not allowed.

    >>> whiten(torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    tensor([[-1.,  0.,  0.],
            [ 1.,  0.,  0.]])
    """
    check_same_shape(values=values, mask=mask)
    check_options(whiten, locals())
    mask = mask.bool()
    kept = values[mask].double()
    mean = kept.mean() if len(kept) else kept.sum()
    equal = not len(kept) or kept.detach().max() - kept.detach().min() < EQUAL_REWARDS
    centred = torch.where(torch.as_tensor(equal, device=kept.device), 0.0, kept - mean)
    square = centred.square().sum() / max(len(kept) - ddof, 1)
    white = centred / torch.where(square > 0, square, 1.0).sqrt() + (0.0 if shift_mean else mean)
    return torch.zeros_like(values).masked_scatter(mask, white.to(values.dtype))


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: Positive | None = 0.2
) -> Tensor:
    """Half the squared error of a critic, which gains nothing by moving further than `clip` in one update (PPO).

    Args:
        values: `[batch, time]`, the critic's values now.
        old_values: `[batch, time]`, its values when the completions were made; treated as constant.
        returns: `[batch, time]`, its targets; treated as constant.
        mask: `[batch, time]`, bool or 0/1.
        clip: How far from `old_values` a value may count: the larger of the two errors, as it is and with the value
            held within that range. None: the error as it is.

    Returns:
        `[batch, time]`, 0 outside the mask.

    Raises:
        ValueError: If shapes differ or `clip` is not positive.

    >>> value_loss(torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([[1]]))
    tensor([[0.3200]])
    """
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    check_options(value_loss, locals())
    old_values, returns = old_values.detach(), returns.detach()
    error = (values - returns).square()
    if clip is not None:
        held = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (held - returns).square())
    return 0.5 * error.masked_fill(~mask.bool(), 0)
