"""The formulas of the policy-gradient losses, each on what all of them are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from alignment_modules.functional.kl import MAX_LOG_RATIO, binary_kl
from alignment_modules.functional.ranges import Finite, NonNegative, Positive, Share
from alignment_modules.functional.reductions import masked_mean


class Tokens(NamedTuple):
    """A batch of sampled tokens, all `[batch, time]`.

    Attributes:
        logps: Under the policy, differentiable.
        old_logps: Under what the policy is compared with, constant.
        log_ratio: Their difference, each token's own; 0 outside the mask and bounded to [-20, 20].
        ratio: The importance ratio at the loss's level; 1 outside the mask.
        advantages: Constant.
        mask: Bool, what is learnt from.
        covariant: Bool, the tokens that "clip_cov" and "kl_cov" treat apart; None where there are none.
    """

    logps: Tensor
    old_logps: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    mask: Tensor
    covariant: Tensor | None


Cuts = Callable[[Tokens, "Settings"], "tuple[Tensor, Tensor]"]
Formula = Callable[[Tokens, "Settings"], Tensor]
Bounds = tuple["float | None", "float | None"]


class Settings(Protocol):
    """What the formulas have free."""

    @property
    def low(self) -> float:
        """Clip range below, as a margin."""

    @property
    def high(self) -> float:
        """Clip range above, as a margin."""

    @property
    def delta(self) -> float | None:
        """Upper bound of the unclipped ratio."""

    @property
    def level(self) -> str:
        """What one ratio spans."""

    @property
    def numbers(self) -> Mapping[str, float]:
        """The loss's own options."""


def _clipped(tokens: Tokens, settings: Settings) -> Tensor:
    ratio, advantages = tokens.ratio, tokens.advantages
    bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    return -torch.minimum(bounded * advantages, ratio.clamp(1 - settings.low, 1 + settings.high) * advantages)


def _reinforce(tokens: Tokens, settings: Settings) -> Tensor:
    return -tokens.ratio * tokens.advantages


def _cispo(tokens: Tokens, settings: Settings) -> Tensor:
    return -tokens.ratio.detach().clamp(max=1 + settings.high) * tokens.advantages * tokens.logps


def _sapo(tokens: Tokens, settings: Settings) -> Tensor:
    numbers = settings.numbers
    temperature = _by_sign(tokens.advantages > 0, numbers["temperature_pos"], numbers["temperature_neg"], tokens.ratio)
    return -4 / temperature * torch.sigmoid(temperature * (tokens.ratio - 1)) * tokens.advantages


def _gmpo(tokens: Tokens, settings: Settings) -> Tensor:
    sign, log_ratio = tokens.advantages.sign(), tokens.log_ratio
    bounded = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-settings.low, settings.high))
    values = -masked_mean(tokens.advantages, tokens.mask) * masked_mean(bounded, tokens.mask).exp()
    return values[:, None].expand_as(tokens.logps)


def vespo_weights(tokens: Tokens, settings: Settings) -> Tensor:
    """`w^k exp(lambda (1 - w))` `[batch, time]` of the sequences' ratios `w`; 1 where `w` is."""
    numbers, learns = settings.numbers, tokens.advantages >= 0
    log_w = tokens.log_ratio.detach().sum(dim=-1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    k = _by_sign(learns, numbers["k_pos"], numbers["k_neg"], log_w)
    rate = _by_sign(learns, numbers["lambda_pos"], numbers["lambda_neg"], log_w)
    return (rate + k * log_w - rate * log_w.exp()).exp()


def _vespo(tokens: Tokens, settings: Settings) -> Tensor:
    return -vespo_weights(tokens, settings) * tokens.advantages * tokens.logps


def _within(cuts: Cuts) -> Formula:
    """The bounded ratio of the tokens that `cuts` leaves, as the weight of their log-probability."""

    def formula(tokens: Tokens, settings: Settings) -> Tensor:
        low, high = cuts(tokens, settings)
        weight = tokens.ratio.detach().clamp(max=settings.numbers["ratio_cap"]).masked_fill(low | high, 0)
        return -weight * tokens.advantages * tokens.logps

    return formula


def _clip_cov(tokens: Tokens, settings: Settings) -> Tensor:
    return _clipped(tokens, settings).masked_fill(_apart(tokens), 0)


def _kl_cov(tokens: Tokens, settings: Settings) -> Tensor:
    held = settings.numbers["kl_coef"] * tokens.log_ratio.abs()
    return _reinforce(tokens, settings) + held.masked_fill(~_apart(tokens), 0)


def _apart(tokens: Tokens) -> Tensor:
    if tokens.covariant is None:
        raise ValueError("covariant=None: this loss needs to know which tokens to treat apart (high_covariance)")
    return tokens.covariant


def ratio_cuts(tokens: Tokens, settings: Settings) -> tuple[Tensor, Tensor]:
    """Where the ratio leaves its range on the side that the advantage pushes it to: below, above."""
    ratio, advantages = tokens.ratio, tokens.advantages
    low, high = ratio < 1 - settings.low, ratio > 1 + settings.high
    return tokens.mask & low & (advantages < 0), tokens.mask & high & (advantages > 0)


def _cap_cuts(tokens: Tokens, settings: Settings) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(tokens.mask), tokens.mask & (tokens.ratio > 1 + settings.high)


def _log_ratio_cuts(tokens: Tokens, settings: Settings) -> tuple[Tensor, Tensor]:
    low, high = tokens.log_ratio < -settings.low, tokens.log_ratio > settings.high
    return tokens.mask & low & (tokens.advantages < 0), tokens.mask & high & (tokens.advantages > 0)


def _tv_cuts(tokens: Tokens, settings: Settings) -> tuple[Tensor, Tensor]:
    moved = tokens.logps.detach().exp() - tokens.old_logps.exp()
    low, high = moved < -settings.low, moved > settings.high
    return tokens.mask & low & (tokens.advantages < 0), tokens.mask & high & (tokens.advantages > 0)


def _kl_cuts(tokens: Tokens, settings: Settings) -> tuple[Tensor, Tensor]:
    logps, old = tokens.logps.detach(), tokens.old_logps
    divergence = binary_kl(old, logps)
    low, high = (divergence > settings.low) & (logps < old), (divergence > settings.high) & (logps > old)
    return tokens.mask & low & (tokens.advantages < 0), tokens.mask & high & (tokens.advantages > 0)


def _by_sign(positive: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    return torch.where(positive, like.new_tensor(one), like.new_tensor(other))


class PolicyLoss(NamedTuple):
    """A loss of the family.

    Attributes:
        formula: Gives the loss `[batch, time]` of each token.
        reduction: The one that belongs to it, for `aggregate`.
        ranges: What its importance ratio may span, the usual one first, each with the clip ranges below and above that
            are its own there; None: it has none.
        text: What it does with the ratio, a template of `low`, `high` (margins), `least`, `most` (ratios) and its own
            numbers.
        numbers: Options of its own: their defaults, and what they may be.
        cuts: Where it takes the gradient from a token for its ratio, below and above; None: nowhere.
        capped: Whether it bounds the ratio from above alone and goes on learning there.
        two_sided: Whether it reads `delta`.
        of_completions: Whether it is a loss of completions, which no other reduction fits.
        of_sampler: Whether it compares with the probabilities that were sampled with, not with scored ones.
        selects: Whether it treats tokens of high covariance apart.
    """

    formula: Formula
    reduction: str
    ranges: Mapping[str, Bounds]
    text: str
    numbers: Mapping[str, tuple[float, Any]] = MappingProxyType({})
    cuts: Cuts | None = None
    capped: bool = False
    two_sided: bool = False
    of_completions: bool = False
    of_sampler: bool = False
    selects: bool = False


_PPO = {"token": (0.2, 0.2), "sequence": (3e-4, 4e-4), "sequence_token": (3e-4, 4e-4)}
_UNBOUNDED = dict.fromkeys(("token", "sequence", "sequence_token"), (None, None))
_CLIPPED = "clipped to [{least:g}, {most:g}]"


def _ppo(reduction: str) -> PolicyLoss:
    return PolicyLoss(_clipped, reduction, _PPO, _CLIPPED, cuts=ratio_cuts, two_sided=True)


_DPPO = {"numbers": {"ratio_cap": (20.0, Positive)}, "of_sampler": True}
_SHARE = {"share": (2e-4, Share)}

LOSSES = {
    "grpo": _ppo("sequence_mean_token_mean"),  # arXiv:2402.03300
    "dapo": _ppo("token_mean"),  # arXiv:2503.14476
    "bnpo": _ppo("token_mean"),
    "dr_grpo": _ppo("sequence_mean_token_sum_norm"),  # arXiv:2503.20783
    "luspo": PolicyLoss(  # arXiv:2602.05261
        _clipped,
        "sequence_mean_token_sum",
        {"sequence": (2e-3, 2.5e-3)},
        _CLIPPED,
        cuts=ratio_cuts,
        two_sided=True,
        of_completions=True,
    ),
    "cispo": PolicyLoss(  # arXiv:2506.13585
        _cispo,
        "token_mean",
        {"token": (None, 4.0), "sequence": (None, 4.0)},
        "capped at {most:g}",
        cuts=_cap_cuts,
        capped=True,
    ),
    "sapo": PolicyLoss(  # arXiv:2511.20347
        _sapo,
        "sequence_mean_token_mean",
        {"token": (None, None), "sequence": (None, None)},
        "through a gate of temperature {temperature_pos:g}, for negative advantages {temperature_neg:g}",
        {"temperature_pos": (1.0, Positive), "temperature_neg": (1.05, Positive)},
    ),
    "gmpo": PolicyLoss(  # arXiv:2507.20673
        _gmpo,
        "sequence_mean_token_mean",
        {"sequence": (0.4, 0.4)},
        "as the geometric mean of its tokens', each clipped to [exp(-{low:g}), exp({high:g})]",
        cuts=_log_ratio_cuts,
        of_completions=True,
    ),
    "vespo": PolicyLoss(  # arXiv:2602.10693
        _vespo,
        "token_mean",
        {"sequence": (None, None)},
        "w, the product of its tokens', as the weight w^k exp(lambda (1 - w)) with k {k_pos:g} and lambda "
        "{lambda_pos:g}, for negative advantages {k_neg:g} and {lambda_neg:g}",
        {"k_pos": (2.0, NonNegative), "lambda_pos": (3.0, NonNegative)}
        | {"k_neg": (3.0, NonNegative), "lambda_neg": (2.0, NonNegative)},
        of_sampler=True,
    ),
    "dppo_tv": PolicyLoss(  # arXiv:2602.04879
        _within(_tv_cuts),
        "token_mean",
        {"token": (0.15, 0.2)},
        "at most {ratio_cap:g}, masked where the probability fell by more than {low:g} or rose by more than {high:g}",
        cuts=_tv_cuts,
        **_DPPO,  # type: ignore[arg-type]
    ),
    "dppo_kl": PolicyLoss(
        _within(_kl_cuts),
        "token_mean",
        {"token": (0.05, 0.05)},
        "at most {ratio_cap:g}, masked where the probability moved on by a divergence of more than {low:g} below or "
        "{high:g} above",
        cuts=_kl_cuts,
        **_DPPO,  # type: ignore[arg-type]
    ),
    "reinforce": PolicyLoss(_reinforce, "token_mean", _UNBOUNDED, "without bounds"),
    "clip_cov": PolicyLoss(  # arXiv:2505.22617
        _clip_cov,
        "token_mean",
        {"token": (0.2, 0.2)},
        _CLIPPED + ", without the gradient of a share {share:g} of the tokens, drawn from those whose covariance is "
        "between {covariance_low:g} and {covariance_high:g}",
        _SHARE | {"covariance_low": (1.0, Finite), "covariance_high": (5.0, Finite)},
        cuts=ratio_cuts,
        two_sided=True,
        selects=True,
    ),
    "kl_cov": PolicyLoss(
        _kl_cov,
        "token_mean",
        {"token": (None, None)},
        "with {kl_coef:g} times the size of its logarithm on the share {share:g} of the tokens of highest covariance",
        _SHARE | {"kl_coef": (1.0, Positive)},
        selects=True,
    ),
}
"""Every loss by its name; where it comes from stands beside it."""
