"""What a critic takes part in: generalized advantages over time, how they are whitened, and the critic's loss."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from alignment_modules.functional.advantages import EQUAL_REWARDS
from alignment_modules.functional.checks import check_same_shape
from alignment_modules.functional.ranges import Positive, Range, Share, check_options


@torch.no_grad()
def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: Share = 1.0,
    lam: Share | Tensor = 0.95,
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
        lam: Trade of bias (0) for variance (1), in [0, 1]; or `[batch]`, one for each row, such as one that grows with
            its length (VAPO, arXiv:2504.05118).
        bootstrap: `[batch]`, value after the last position; None: 0, right for sequences that ended by themselves.

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
