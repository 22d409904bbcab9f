"""Policy-gradient losses on sampled tokens, unreduced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alignment_modules.functional.checks import check_choice, check_same_shape
from alignment_modules.functional.kl import MAX_LOG_RATIO
from alignment_modules.functional.ranges import NonNegative, Positive, Share, check_options
from alignment_modules.functional.reductions import masked_mean

LOSS_REDUCTIONS: dict[str, str] = {
    "grpo": "sequence_mean_token_mean",
    "dapo": "token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "sequence_mean_token_sum_norm",
    "cispo": "token_mean",
}
"""Names that `policy_gradient_loss` takes, and the reduction that belongs to each.

"bnpo" differs from "dapo" only where the count of one micro-batch stands for the count of the step; with exact counts
they are the same.
"""

CISPO_MARGIN = 4.0
"""How far above 1 "cispo" caps the ratio by default: PPO's 0.2 would cut what it is made to keep."""

IMPORTANCE_LEVELS = ("token", "sequence")
"""What one importance ratio spans. "sequence" is GSPO's (arXiv:2507.18071), meant for `epsilon` of 3e-4, not 0.2."""


class ClipMasks(NamedTuple):
    """Where clipping acts; all `[batch, time]` and False outside the mask.

    Attributes:
        low: The ratio is below the range and the advantage is negative ("cispo" has no lower bound: nowhere).
        high: The ratio is above the range and the advantage is positive ("cispo": whatever the advantage).
        region: Either of them.
        ratio: The importance ratio, 1 outside the mask.
    """

    low: Tensor
    high: Tensor
    region: Tensor
    ratio: Tensor


def importance_ratio(token_logps: Tensor, old_token_logps: Tensor, mask: Tensor, *, level: str = "token") -> Tensor:
    """`p / p_old` of each token, or of each sequence as the geometric mean over its tokens.

    Args:
        token_logps: `[batch, time]`, under the policy, in nats.
        old_token_logps: `[batch, time]`, under the policy that sampled; treated as constant.
        mask: `[batch, time]`, bool or 0/1.
        level: One of `IMPORTANCE_LEVELS`.

    Returns:
        `[batch, time]`, differentiable, 1 outside the mask. Log-ratios are bounded to [-20, 20].

    Raises:
        ValueError: If the level is unknown or shapes differ.

    >>> importance_ratio(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -2.0]]), torch.tensor([[1, 1]]))
    tensor([[1.0000, 2.7183]])
    """
    check_choice("importance_level", level, IMPORTANCE_LEVELS)
    check_same_shape(token_logps=token_logps, old_token_logps=old_token_logps, mask=mask)
    mask = mask.bool()
    log_ratio = torch.where(mask, token_logps - old_token_logps.detach(), 0.0)
    if level == "sequence":
        log_ratio = torch.where(mask, masked_mean(log_ratio, mask)[:, None], 0.0)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@dataclass(frozen=True)
class Surrogate:
    """What a policy gradient maximises in place of the reward, as one value that checks itself.

    Args:
        loss: A key of `LOSS_REDUCTIONS`.
        epsilon: Clip range below 1, in [0, 1]; above 1 too where `epsilon_high` is None. "cispo" reads it nowhere.
        epsilon_high: Clip range above 1, >= 0 (DAPO's clip-higher is 0.28); for "cispo" how far above 1 its cap is.
            None: `epsilon`, for "cispo" 4.0.
        delta: Upper bound of the unclipped ratio, > 1 + `epsilon_high`; None: no bound.
        importance_level: "token", or "sequence" (GSPO).

    Raises:
        ValueError: If an option is unknown, out of range, or without effect.

    >>> Surrogate(loss="cispo").describe()
    'cispo, token-level ratio capped at 5'
    """

    loss: str = "dapo"
    epsilon: Share = 0.2
    epsilon_high: NonNegative | None = None
    delta: Positive | None = None
    importance_level: str = "token"

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, LOSS_REDUCTIONS)
        check_choice("importance_level", self.importance_level, IMPORTANCE_LEVELS)
        check_options(Surrogate, vars(self))
        if self.delta is not None and self.loss == "cispo":
            raise ValueError(f"delta has no effect with loss='cispo' and must be None, got {self.delta}")
        if self.delta is not None and not self.delta > self.highest:
            raise ValueError(f"delta must be > 1 + epsilon_high = {self.highest:g}, got {self.delta}")

    @property
    def highest(self) -> float:
        """The ratio beyond which nothing is gained: 1 and the clip range above it."""
        if self.epsilon_high is not None:
            return 1 + self.epsilon_high
        return 1 + (CISPO_MARGIN if self.loss == "cispo" else self.epsilon)

    @property
    def reduction(self) -> str:
        """The reduction that belongs to the loss, for `aggregate`."""
        return LOSS_REDUCTIONS[self.loss]

    def describe(self) -> str:
        """The loss and its bounds, in words."""
        ratio = f"{self.loss}, {self.importance_level}-level ratio"
        if self.loss == "cispo":
            return f"{ratio} capped at {self.highest:g}"
        beyond = "" if self.delta is None else f", at most {self.delta} where the advantage is negative"
        return f"{ratio} clipped to [{1 - self.epsilon:g}, {self.highest:g}]{beyond}"

    def __call__(self, token_logps: Tensor, old_token_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """`policy_gradient_loss` with these options."""
        weight = _per_token(advantages, token_logps)
        mask = mask.bool()
        ratio = importance_ratio(token_logps, old_token_logps, mask, level=self.importance_level)
        if self.loss == "cispo":
            values = -ratio.detach().clamp(max=self.highest) * weight * token_logps
        else:
            bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
            values = -torch.minimum(bounded * weight, ratio.clamp(1 - self.epsilon, self.highest) * weight)
        return values.masked_fill(~mask, 0)

    @torch.no_grad()
    def clip_masks(self, token_logps: Tensor, old_token_logps: Tensor, advantages: Tensor, mask: Tensor) -> ClipMasks:
        """Tokens on which the loss clips the ratio; it takes what `policy_gradient_loss` takes.

        >>> policy, old = torch.tensor([[0.0, -2.0]]), torch.tensor([[-1.0, -2.0]])
        >>> Surrogate().clip_masks(policy, old, torch.tensor([1.0]), torch.tensor([[1, 1]])).high
        tensor([[ True, False]])
        """
        weight = _per_token(advantages, token_logps)
        mask = mask.bool()
        ratio = importance_ratio(token_logps, old_token_logps, mask, level=self.importance_level)
        above = mask & (ratio > self.highest)
        if self.loss == "cispo":
            low, high = torch.zeros_like(mask), above
        else:
            low, high = mask & (ratio < 1 - self.epsilon) & (weight < 0), above & (weight > 0)
        return ClipMasks(low, high, low | high, ratio)

    @torch.no_grad()
    def statistics(
        self, token_logps: Tensor, old_token_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> dict[str, tuple[Tensor, Tensor, str]]:
        """Shares of clipped tokens under the usual metric names, ready to be added up over micro-batches and ranks.

        Args:
            token_logps: As in `policy_gradient_loss`, and so are the others.
            old_token_logps: `[batch, time]`.
            advantages: `[batch]` or `[batch, time]`.
            mask: `[batch, time]`.

        Returns:
            `name -> (total, weight, kind)`, 0-dim tensors. Kind "mean": `total / weight` over all tokens; "min" and
            "max": `total` is the extreme over sequences of their share (infinite where there is no sequence). Names are
            `clip_ratio/{low,high,region}_mean`, `clip_ratio/low_min`, `clip_ratio/high_max`, `importance_ratio/mean`
            and, for "cispo", `cispo_clip_ratio` in place of those of `clip_ratio`.

        Raises:
            ValueError: If shapes do not fit.

        >>> policy, old = torch.tensor([[0.0, -2.0]]), torch.tensor([[-1.0, -2.0]])
        >>> Surrogate().statistics(policy, old, torch.tensor([1.0]), torch.tensor([[1, 1]]))["clip_ratio/high_mean"]
        (tensor(1.), tensor(2.), 'mean')
        """
        masks = self.clip_masks(token_logps, old_token_logps, advantages, mask)
        mask = mask.bool()
        tokens = mask.sum().to(token_logps.dtype)
        ratio = torch.where(mask, masks.ratio, 0.0).sum()

        def mean(clipped: Tensor) -> tuple[Tensor, Tensor, str]:
            return clipped.sum().to(tokens.dtype), tokens, "mean"

        statistics = {"importance_ratio/mean": (ratio, tokens, "mean")}
        if self.loss == "cispo":
            return statistics | {"cispo_clip_ratio": mean(masks.high)}
        filled = mask.any(dim=1)
        nothing = token_logps.new_full((1,), torch.inf)
        lowest = torch.cat([masked_mean(masks.low.to(tokens.dtype), mask)[filled], nothing]).amin()
        highest = torch.cat([masked_mean(masks.high.to(tokens.dtype), mask)[filled], -nothing]).amax()
        return statistics | {
            "clip_ratio/low_mean": mean(masks.low),
            "clip_ratio/high_mean": mean(masks.high),
            "clip_ratio/region_mean": mean(masks.region),
            "clip_ratio/low_min": (lowest, tokens, "min"),
            "clip_ratio/high_max": (highest, tokens, "max"),
        }


def policy_gradient_loss(
    token_logps: Tensor,
    old_token_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    importance_level: str = "token",
    delta: float | None = None,
) -> Tensor:
    """Per-token policy-gradient loss; reduce it with `aggregate(..., reduction=LOSS_REDUCTIONS[loss])`.

    With the ratio `rho = p / p_old` and the advantage `A`:

    - "grpo", "dapo", "bnpo", "dr_grpo": `-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)` (PPO,
      arXiv:1707.06347). They differ in their reduction. With `delta`, `rho` in the first term is at most `delta`,
      which bounds the loss of tokens with negative advantage (INTELLECT-2, arXiv:2505.07291).
    - "cispo": `-sg(min(rho, 1 + epsilon_high)) A log p` (MiniMax-M1, arXiv:2506.13585): no token loses its gradient.
      `epsilon_high` is a margin above 1 here; a cap given as it is, such as TRL's 5.0, is one of 4.0.

    Args:
        token_logps: `[batch, time]`, log-probabilities of the sampled tokens under the policy, in nats.
        old_token_logps: `[batch, time]`, under the policy that sampled. For the first update after sampling pass
            `token_logps.detach()`: the ratio is then exactly 1 and its gradient REINFORCE's.
        advantages: `[batch]` or `[batch, time]`.
        mask: `[batch, time]`, bool or 0/1: the policy's own tokens, the stop token included.
        loss: As in `Surrogate`, and so are the others.
        epsilon: Clip range below 1.
        epsilon_high: Clip range above 1.
        importance_level: "token" or "sequence".
        delta: Upper bound of the unclipped ratio.

    Returns:
        `[batch, time]`, 0 outside the mask.

    Raises:
        ValueError: If shapes do not fit, or an option is unknown, out of range or without effect.

    >>> logps = torch.tensor([[-1.0, -2.0]])
    >>> policy_gradient_loss(logps, logps, torch.tensor([0.5]), torch.tensor([[1, 1]]))
    tensor([[-0.5000, -0.5000]])
    """
    surrogate = Surrogate(loss, epsilon, epsilon_high, delta, importance_level)
    return surrogate(token_logps, old_token_logps, advantages, mask)


def _per_token(advantages: Tensor, token_logps: Tensor) -> Tensor:
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(-1, token_logps.shape[-1])
    if advantages.shape != token_logps.shape:
        raise ValueError(
            f"advantages must be [batch] or [batch, time] of token_logps, {tuple(token_logps.shape)}, "
            f"got {tuple(advantages.shape)}"
        )
    return advantages.detach()
