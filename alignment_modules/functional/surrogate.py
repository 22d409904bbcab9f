"""Policy-gradient losses on sampled tokens, unreduced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alignment_modules.functional.checks import check_choice, check_same_shape
from alignment_modules.functional.kl import MAX_LOG_RATIO
from alignment_modules.functional.policy_losses import LOSSES, PolicyLoss, Tokens, vespo_weights
from alignment_modules.functional.ranges import NonNegative, Positive, Share, check_options, describe, fits
from alignment_modules.functional.reductions import REDUCTIONS, masked_mean

LOSS_REDUCTIONS: dict[str, str] = {name: loss.reduction for name, loss in LOSSES.items()}
"""Names that `policy_gradient_loss` takes, and the reduction that belongs to each.

"bnpo" differs from "dapo" only where the count of one micro-batch stands for the count of the step; with exact counts
they are the same.
"""

IMPORTANCE_LEVELS = ("token", "sequence", "sequence_token")
"""What one importance ratio spans. "sequence" is GSPO's (arXiv:2507.18071): the geometric mean over a completion's
tokens. "sequence_token" is GSPO-token's: the same value, with the gradient of the token's own ratio, for advantages
that differ from token to token; where they do not, both have the same gradient."""


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
    if level != "token":
        mean = torch.where(mask, masked_mean(log_ratio, mask)[:, None], 0.0)
        log_ratio = mean if level == "sequence" else log_ratio + (mean - log_ratio).detach()
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@dataclass(frozen=True)
class Surrogate:
    """What a policy gradient maximises in place of the reward, as one value that checks itself.

    Args:
        loss: A key of `LOSS_REDUCTIONS`; see `policy_gradient_loss` for the formulas.
        epsilon: Clip range below 1, in [0, 1]; above 1 too where `epsilon_high` is None. None: the loss's own.
        epsilon_high: Clip range above 1, >= 0 (DAPO's clip-higher is 0.28); for "cispo" how far above 1 its cap is.
            None: `epsilon`, or the loss's own.
        delta: Upper bound of the unclipped ratio, > 1 + `epsilon_high`, known as dual clip, too; None: no bound.
        importance_level: One of `IMPORTANCE_LEVELS`; None: "token", for losses of completions "sequence".
        reduction: One of `REDUCTIONS`; None: the loss's own.
        loss_options: The loss's own numbers by name, as far as they differ from its defaults.

    Raises:
        ValueError: If an option is unknown, out of range, or without effect.

    >>> Surrogate(loss="cispo").describe()
    'cispo, token-level ratio capped at 5'
    """

    loss: str = "dapo"
    epsilon: Share | None = None
    epsilon_high: NonNegative | None = None
    delta: Positive | None = None
    importance_level: str | None = None
    reduction: str | None = None
    loss_options: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, LOSSES)
        check_options(Surrogate, vars(self))
        if self.importance_level is not None:
            check_choice("importance_level", self.importance_level, IMPORTANCE_LEVELS)
            if self.importance_level not in self.row.ranges:
                allowed = ", ".join(map(repr, self.row.ranges))
                raise ValueError(f"importance_level={self.importance_level!r}: loss={self.loss!r} takes {allowed}")
        for name, bound in zip(("epsilon", "epsilon_high"), self.row.ranges[self.level], strict=True):
            self._check_read(name, bound is not None)
        self._check_read("delta", self.row.two_sided)
        if self.delta is not None and not self.delta > 1 + self.high:
            raise ValueError(f"delta must be > 1 + epsilon_high = {1 + self.high:g}, got {self.delta}")
        if self.reduction is not None:
            check_choice("reduction", self.reduction, REDUCTIONS)
            if self.row.of_completions and self.reduction != self.row.reduction:
                raise ValueError(
                    f"reduction={self.reduction!r}: loss={self.loss!r} is one of completions, {self.row.reduction!r}"
                )
        self._check_numbers()

    def _check_read(self, name: str, read: bool) -> None:
        value = getattr(self, name)
        if value is not None and not read:
            raise ValueError(f"{name} has no effect with loss={self.loss!r} and must be None, got {value}")

    def _check_numbers(self) -> None:
        numbers = self.row.numbers
        for name, value in (self.loss_options or {}).items():
            if name not in numbers:
                allowed = f"has {', '.join(map(repr, numbers))}" if numbers else "has none"
                raise ValueError(f"loss_options={{{name!r}: {value!r}}}: loss={self.loss!r} {allowed}")
            if not fits(value, numbers[name][1]):
                raise ValueError(f"loss_options={{{name!r}: {value!r}}} must be {describe(numbers[name][1])}")
        if "covariance_low" in numbers and not self.numbers["covariance_low"] < self.numbers["covariance_high"]:
            raise ValueError(
                f"loss_options: covariance_low={self.numbers['covariance_low']:g} must be below "
                f"covariance_high={self.numbers['covariance_high']:g}"
            )

    @property
    def row(self) -> PolicyLoss:
        """What is known of the loss."""
        return LOSSES[self.loss]

    @property
    def level(self) -> str:
        """What one importance ratio spans."""
        return next(iter(self.row.ranges)) if self.importance_level is None else self.importance_level

    @property
    def low(self) -> float:
        """The clip range below, as a margin; infinite where the loss has none."""
        own = self.row.ranges[self.level][0]
        return math.inf if own is None else own if self.epsilon is None else self.epsilon

    @property
    def high(self) -> float:
        """The clip range above, as a margin; infinite where the loss has none."""
        if self.epsilon_high is not None:
            return self.epsilon_high
        own = self.row.ranges[self.level][1]
        return math.inf if own is None else own if self.epsilon is None else self.epsilon

    @property
    def numbers(self) -> dict[str, float]:
        """The loss's own options, with its defaults."""
        return {name: default for name, (default, _) in self.row.numbers.items()} | dict(self.loss_options or {})

    @property
    def reduced_by(self) -> str:
        """The reduction for `aggregate`."""
        return self.reduction or self.row.reduction

    def describe(self) -> str:
        """The loss and its bounds, in words."""
        low, high = self.low, self.high
        text = self.row.text.format(low=low, high=high, least=1 - low, most=1 + high, **self.numbers)
        beyond = "" if self.delta is None else f", at most {self.delta} where the advantage is negative"
        return f"{self.loss}, {self.level}-level ratio {text}{beyond}"

    def __call__(
        self,
        token_logps: Tensor,
        old_token_logps: Tensor,
        advantages: Tensor,
        mask: Tensor,
        covariant: Tensor | None = None,
    ) -> Tensor:
        """`policy_gradient_loss` with these options."""
        tokens = self._tokens(token_logps, old_token_logps, advantages, mask, covariant)
        return self.row.formula(tokens, self).masked_fill(~tokens.mask, 0)

    def _tokens(
        self, token_logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, covariant: Tensor | None = None
    ) -> Tokens:
        weight, mask = per_token_advantages(advantages, token_logps), mask.bool()
        ratio = importance_ratio(token_logps, old, mask, level=self.level)
        log_ratio = torch.where(mask, token_logps - old.detach(), 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return Tokens(token_logps, old.detach(), log_ratio, ratio, weight, mask, covariant)

    @torch.no_grad()
    def clip_masks(self, token_logps: Tensor, old_token_logps: Tensor, advantages: Tensor, mask: Tensor) -> ClipMasks:
        """Tokens on which the loss clips the ratio; it takes what `policy_gradient_loss` takes.

        >>> policy, old = torch.tensor([[0.0, -2.0]]), torch.tensor([[-1.0, -2.0]])
        >>> Surrogate().clip_masks(policy, old, torch.tensor([1.0]), torch.tensor([[1, 1]])).high
        tensor([[ True, False]])
        """
        tokens = self._tokens(token_logps, old_token_logps, advantages, mask)
        nowhere = torch.zeros_like(tokens.mask)
        low, high = (nowhere, nowhere) if self.row.cuts is None else self.row.cuts(tokens, self)
        return ClipMasks(low, high, low | high, tokens.ratio)

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
            `importance_ratio/mean` and, where the loss takes the gradient from tokens,
            `clip_ratio/{low,high,region}_mean`, `clip_ratio/low_min`, `clip_ratio/high_max`; for "cispo"
            `cispo_clip_ratio`, for "vespo" `vespo/phi_seq_mean` (the mean weight over sequences).

        Raises:
            ValueError: If shapes do not fit.

        >>> policy, old = torch.tensor([[0.0, -2.0]]), torch.tensor([[-1.0, -2.0]])
        >>> Surrogate().statistics(policy, old, torch.tensor([1.0]), torch.tensor([[1, 1]]))["clip_ratio/high_mean"]
        (tensor(1.), tensor(2.), 'mean')
        """
        tokens = self._tokens(token_logps, old_token_logps, advantages, mask)
        masks = self.clip_masks(token_logps, old_token_logps, advantages, mask)
        count = tokens.mask.sum().to(token_logps.dtype)
        filled = tokens.mask.any(dim=1)

        def mean(clipped: Tensor) -> tuple[Tensor, Tensor, str]:
            return clipped.sum().to(count.dtype), count, "mean"

        statistics = {"importance_ratio/mean": mean(torch.where(tokens.mask, masks.ratio, 0.0))}
        if self.loss == "vespo":
            weights = masked_mean(vespo_weights(tokens, self).expand_as(token_logps), tokens.mask)
            statistics["vespo/phi_seq_mean"] = (weights.sum(), filled.sum().to(count.dtype), "mean")
        if self.row.capped:
            return statistics | {f"{self.loss}_clip_ratio": mean(masks.high)}
        if self.row.cuts is None:
            return statistics
        nothing = token_logps.new_full((1,), torch.inf)
        lowest = torch.cat([masked_mean(masks.low.to(count.dtype), tokens.mask)[filled], nothing]).amin()
        highest = torch.cat([masked_mean(masks.high.to(count.dtype), tokens.mask)[filled], -nothing]).amax()
        return statistics | {
            "clip_ratio/low_mean": mean(masks.low),
            "clip_ratio/high_mean": mean(masks.high),
            "clip_ratio/region_mean": mean(masks.region),
            "clip_ratio/low_min": (lowest, count, "min"),
            "clip_ratio/high_max": (highest, count, "max"),
        }


def policy_gradient_loss(
    token_logps: Tensor,
    old_token_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss: str = "dapo",
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    importance_level: str | None = None,
    delta: float | None = None,
    loss_options: Mapping[str, float] | None = None,
    covariant: Tensor | None = None,
) -> Tensor:
    """Per-token policy-gradient loss; reduce it with `aggregate(..., reduction=LOSS_REDUCTIONS[loss])`.

    With the ratio `rho = p / p_old` of a token (`w` of a completion), the advantage `A` and `sg` for "constant":

    - "grpo", "dapo", "bnpo", "dr_grpo": `-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)` (PPO,
      arXiv:1707.06347). They differ in their reduction. With `delta`, `rho` in the first term is at most `delta`,
      which bounds the loss of tokens with negative advantage (INTELLECT-2, arXiv:2505.07291); with `delta = c` it is
      the dual clip `max(min(rho A, clip(rho) A), c A)` of arXiv:1912.09729. `importance_level="sequence"` is GSPO
      (arXiv:2507.18071), with clip ranges of 3e-4 and 4e-4 by default.
    - "luspo": the same of sequence ratios, summed over a completion's tokens (arXiv:2602.05261).
    - "reinforce": `-rho A`, without bounds.
    - "cispo": `-sg(min(rho, 1 + epsilon_high)) A log p` (MiniMax-M1, arXiv:2506.13585): no token loses its gradient.
      `epsilon_high` is a margin above 1 here; a cap given as it is, such as TRL's 5.0, is one of 4.0.
    - "sapo": `-4/t sigmoid(t (rho - 1)) A`, `t` `temperature_pos` where `A > 0`, else `temperature_neg`
      (arXiv:2511.20347); of tokens or of sequences.
    - "gmpo": for each token of a completion `-A exp(mean_t s min(s x_t, s clip(x_t, -epsilon, epsilon_high)))`, `x_t`
      its tokens' log-ratios and `s` the sign of `A` (arXiv:2507.20673). Of advantages by token, `A` is the mean.
    - "vespo": `-sg(w^k exp(lambda (1 - w))) A log p`, `w` the product of the completion's ratios (arXiv:2602.10693).
    - "dppo_tv", "dppo_kl": `-sg(min(rho, ratio_cap)) A log p`, but 0 where the probability has already moved the way
      that `A` pushes it: by more than `epsilon_high` up or `epsilon` down ("dppo_tv"), or so far that the binary KL of
      the old from the new is more ("dppo_kl") (arXiv:2602.04879).
    - "clip_cov": PPO's, but 0 at the tokens `covariant`; "kl_cov": `-rho A`, plus `kl_coef |log rho|` at these
      (arXiv:2505.22617). `high_covariance` finds them.

    "vespo" and the "dppo" losses are meant for the probabilities that the sampler told, not for scored ones.

    Args:
        token_logps: `[batch, time]`, log-probabilities of the sampled tokens under the policy, in nats.
        old_token_logps: `[batch, time]`, under the policy that sampled. For the first update after sampling pass
            `token_logps.detach()`: the ratio is then exactly 1 and its gradient REINFORCE's.
        advantages: `[batch]` or `[batch, time]`.
        mask: `[batch, time]`, bool or 0/1: the policy's own tokens, the stop token included.
        loss: As in `Surrogate`, and so are the others.
        epsilon: Clip range below 1.
        epsilon_high: Clip range above 1.
        importance_level: "token", "sequence" or "sequence_token".
        delta: Upper bound of the unclipped ratio.
        loss_options: The loss's own numbers by name.
        covariant: `[batch, time]` bool, for "clip_cov" and "kl_cov" alone.

    Returns:
        `[batch, time]`, 0 outside the mask.

    Raises:
        ValueError: If shapes do not fit, or an option is unknown, out of range or without effect.

    >>> logps = torch.tensor([[-1.0, -2.0]])
    >>> policy_gradient_loss(logps, logps, torch.tensor([0.5]), torch.tensor([[1, 1]]))
    tensor([[-0.5000, -0.5000]])
    """
    options = {"delta": delta, "importance_level": importance_level, "loss_options": loss_options}
    surrogate = Surrogate(loss, epsilon, epsilon_high, **options)  # type: ignore[arg-type]
    return surrogate(token_logps, old_token_logps, advantages, mask, covariant)


def per_token_advantages(advantages: Tensor, token_logps: Tensor) -> Tensor:
    """Advantages `[batch, time]` without gradient, given those of sequences `[batch]` or of tokens.

    Raises:
        ValueError: If they have another shape than `token_logps`, whose advantages they are.
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(-1, token_logps.shape[-1])
    if advantages.shape != token_logps.shape:
        raise ValueError(
            f"advantages must be [batch] or [batch, time] of token_logps, {tuple(token_logps.shape)}, "
            f"got {tuple(advantages.shape)}"
        )
    return advantages.detach()
