"""Preference losses on pairs of completions, unreduced."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment_modules.functional.checks import check_choice, check_same_shape
from alignment_modules.functional.kl import exp_bounded
from alignment_modules.functional.ranges import Positive, Range, Share, check_options

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
"""Names that `preference_loss` takes as `f_divergence`."""

BATCH_COUPLED_LOSSES = frozenset({"aot", "aot_unpaired"})
"""Losses that sort the pairs they are given: for a part of them, say by `Preference.partners` what the whole is."""


class _Pairs(NamedTuple):
    """One batch of pairs, all `[batch]`."""

    chosen: Tensor  # log p - log p_ref, or another f-divergence's score of it
    rejected: Tensor
    policy_chosen: Tensor
    policy_margin: Tensor
    reference_margin: Tensor
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    partners: Tensor | None


@dataclass(frozen=True)
class Preference:
    """How pairs of completions are compared, as one value that checks itself.

    Args:
        loss: One of `PREFERENCE_LOSSES`.
        beta: Strength of the pull to the reference, > 0 (`tau` for "ipo").
        label_smoothing: Assumed share of wrong labels, in [0, 0.5); > 0 for "exo_pair", 0 for losses that have no such
            term.
        f_divergence: One of `F_DIVERGENCES`; "reverse_kl" for losses that are not written in `w - l`.
        alpha: Coefficient of the alpha-divergence, in [0, 1]; 1 is "reverse_kl", 0 is "forward_kl".
        discopop_tau: Temperature of "discopop", > 0.

    Raises:
        ValueError: If an option is unknown, out of range, or without effect on this loss.
    """

    loss: str = "sigmoid"
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Range(0, 0.5, "[)")] = 0.0
    f_divergence: str = "reverse_kl"
    alpha: Share = 0.5
    discopop_tau: Positive = 0.05

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, PREFERENCE_LOSSES)
        check_choice("f_divergence", self.f_divergence, F_DIVERGENCES)
        check_options(Preference, vars(self))
        if self.label_smoothing and self.loss not in _SMOOTHED:
            raise ValueError(
                f"label_smoothing must be 0 for loss={self.loss!r}, which has no such term, got "
                f"{self.label_smoothing}; it is used by {', '.join(sorted(_SMOOTHED))}"
            )
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError("label_smoothing must be > 0 for loss='exo_pair' (its paper uses 1e-3), got 0")
        if self.f_divergence != "reverse_kl" and self.loss not in _DIVERGENT:
            raise ValueError(
                f"f_divergence must be 'reverse_kl' for loss={self.loss!r}, got {self.f_divergence!r}; "
                f"others are used by {', '.join(sorted(_DIVERGENT))}"
            )

    def __call__(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        partners: Tensor | None = None,
    ) -> Tensor:
        """`preference_loss` with these options.

        Args:
            policy_chosen_logps: As in `preference_loss`, and so are the others that are not named here.
            policy_rejected_logps: `[batch]`.
            reference_chosen_logps: `[batch]`.
            reference_rejected_logps: `[batch]`.
            chosen_lengths: `[batch]` or None.
            rejected_lengths: `[batch]` or None.
            partners: `[batch, 2]`, what `partners` gave for these pairs, where they are a part of those that are
                sorted. The sum over all parts is then that of the whole, and so is its gradient; the other losses
                ignore it.
        """
        check_same_shape(
            policy_chosen_logps=policy_chosen_logps,
            policy_rejected_logps=policy_rejected_logps,
            reference_chosen_logps=reference_chosen_logps,
            reference_rejected_logps=reference_rejected_logps,
        )
        for name, lengths in (("chosen_lengths", chosen_lengths), ("rejected_lengths", rejected_lengths)):
            if lengths is not None:
                check_same_shape(**{"policy_chosen_logps": policy_chosen_logps, name: lengths})
        if (chosen_lengths is None) != (rejected_lengths is None) and self.loss != "sft":
            raise ValueError("chosen_lengths and rejected_lengths must be given together")
        reference_chosen, reference_rejected = reference_chosen_logps.detach(), reference_rejected_logps.detach()
        pairs = _Pairs(
            chosen=_divergence_score(policy_chosen_logps - reference_chosen, self.f_divergence, self.alpha),
            rejected=_divergence_score(policy_rejected_logps - reference_rejected, self.f_divergence, self.alpha),
            policy_chosen=policy_chosen_logps,
            policy_margin=policy_chosen_logps - policy_rejected_logps,
            reference_margin=reference_chosen - reference_rejected,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            partners=partners,
        )
        return _LOSSES[self.loss](pairs, self)

    @torch.no_grad()
    def partners(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> Tensor:
        """For the losses of `BATCH_COUPLED_LOSSES`, what sorting holds each pair's two values against.

        Args:
            policy_chosen_logps: `[batch]`, as in `preference_loss`, of all pairs that are sorted together.
            policy_rejected_logps: `[batch]`.
            reference_chosen_logps: `[batch]`.
            reference_rejected_logps: `[batch]`.

        Returns:
            `[batch, 2]`: the value of the same rank on the other side, for the pair's value on the left of the
            difference and for that on its right.
        """
        policy, reference = (
            (policy_chosen_logps, policy_rejected_logps),
            (reference_chosen_logps, reference_rejected_logps),
        )
        if self.loss == "aot":
            left, right = policy[0] - policy[1], reference[0] - reference[1]
        else:
            left, right = policy[0] - reference[0], policy[1] - reference[1]
        return torch.stack([right.sort().values[_ranks(left)], left.sort().values[_ranks(right)]], dim=1)


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
    discopop_tau: float = 0.05,
) -> Tensor:
    """Loss of each pair of completions.

    With `w` and `l` the log-ratios `log p - log p_ref` of the chosen and the rejected completion, `h = w - l` and `s`
    the sigmoid; `e` is `label_smoothing`:

    | loss | formula | source |
    |---|---|---|
    | `sigmoid` | `-(1 - e) log s(beta h) - e log s(-beta h)` | DPO, arXiv:2305.18290, conservative with e > 0 |
    | `robust` | `(-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e)` | arXiv:2403.00409 |
    | `ipo` | `(w / len_w - l / len_l - 1 / (2 beta))^2`, beta is its tau | arXiv:2310.12036, eq. 17 |
    | `hinge` | `max(0, 1 - beta h)` | SLiC, arXiv:2305.10425 |
    | `exo_pair` | `KL([s(beta h), s(-beta h)] from [1 - e, e])`, e > 0 | arXiv:2402.00856, eq. 16 |
    | `nca_pair` | `-log s(beta w) - (log s(-beta w) + log s(-beta l)) / 2` | arXiv:2402.05369 |
    | `bco_pair` | `-log s(beta w) - log s(-beta l)` | arXiv:2404.04656, without its running mean |
    | `sppo_hard` | `(w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2` | arXiv:2405.00675, eq. 4.7 |
    | `apo_zero` | `1 - s(beta w) + s(beta l)` | arXiv:2408.06266, eq. 7 |
    | `apo_down` | `s(beta w) + 1 - s(beta h)` | arXiv:2408.06266, eq. 8 |
    | `aot` | sigmoid of sorted policy margins less sorted reference margins | arXiv:2406.05882 |
    | `aot_unpaired` | sigmoid of sorted w less sorted l | arXiv:2406.05882 |
    | `discopop` | `(1 - m)(-log s(beta h)) + m exp(-beta h)`, `m = s(beta h / tau)` | arXiv:2406.08414, eq. 5 |
    | `sigmoid_norm` | `sigmoid` of `w / len_w - l / len_l` | length-normalised DPO, arXiv:2411.15124 |
    | `sft` | `-log p(chosen) / len_w` | |

    Args:
        policy_chosen_logps: `[batch]`, the chosen completions' log-probabilities, summed over tokens, in nats.
        policy_rejected_logps: `[batch]`, the rejected ones'.
        reference_chosen_logps: `[batch]`, under the reference; treated as constant.
        reference_rejected_logps: `[batch]`.
        loss: One of `PREFERENCE_LOSSES`.
        beta: As in `Preference`, and so are the others.
        label_smoothing: Assumed share of wrong labels.
        chosen_lengths: `[batch]`, tokens of each chosen completion, for `ipo`, `sigmoid_norm` and `sft`. None: their
            log-probabilities are taken as they are, averages or sums.
        rejected_lengths: `[batch]`, likewise.
        f_divergence: One of `F_DIVERGENCES` (arXiv:2309.16240): replaces `w` and `l` by its score where the formula
            has them through their difference.
        alpha: Coefficient of the alpha-divergence.
        discopop_tau: Temperature of `discopop`.

    Returns:
        `[batch]`.

    Raises:
        ValueError: If shapes differ, or an option is unknown, out of range, or without effect on this loss.

    >>> zero = torch.zeros(1)
    >>> preference_loss(zero, zero, zero, zero)
    tensor([0.6931])
    """
    return Preference(loss, beta, label_smoothing, f_divergence, alpha, discopop_tau)(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )


def length_desensitized_logps(token_logps: Tensor, mask: Tensor, shared_lengths: Tensor, *, ld_alpha: Share) -> Tensor:
    """Log-probabilities in which the tokens beyond the pair's shorter completion count less (LD-DPO, arXiv:2409.06411).

    Use the result in place of the sums that `preference_loss` takes, for the policy and the reference alike.

    Args:
        token_logps: `[batch, time]`, in nats.
        mask: `[batch, time]`, bool or 0/1.
        shared_lengths: `[batch]`, the smaller of the pair's two numbers of tokens.
        ld_alpha: Weight of the tokens beyond, in [0, 1]; 1 is the plain sum.

    Returns:
        `[batch]`.

    Raises:
        ValueError: If shapes differ or `ld_alpha` is outside [0, 1].

    >>> length_desensitized_logps(-torch.ones(1, 4), torch.ones(1, 4), torch.tensor([2]), ld_alpha=0.25)
    tensor([-2.5000])
    """
    check_same_shape(token_logps=token_logps, mask=mask)
    check_options(length_desensitized_logps, locals())
    mask = mask.bool()
    shared = mask.cumsum(dim=1) <= shared_lengths[:, None]
    weights = torch.where(shared, 1.0, ld_alpha).to(token_logps.dtype)
    return (token_logps.masked_fill(~mask, 0) * weights).sum(dim=1)


def _divergence_score(log_ratio: Tensor, f_divergence: str, alpha: float) -> Tensor:
    """`f'(p / p_ref)` up to a constant that drops out of differences."""
    if f_divergence == "forward_kl":
        f_divergence, alpha = "alpha", 0.0
    if f_divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    if f_divergence == "alpha" and abs(alpha - 1) > 1e-6:
        return (exp_bounded((alpha - 1) * log_ratio, 40.0) - 1) / (alpha - 1)
    return log_ratio


def _per_token(logps: Tensor, lengths: Tensor | None) -> Tensor:
    return logps if lengths is None else logps / lengths.clamp(min=1)


def _mean_margin(pairs: _Pairs) -> Tensor:
    return _per_token(pairs.chosen, pairs.chosen_lengths) - _per_token(pairs.rejected, pairs.rejected_lengths)


def _logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def _sigmoid(pairs: _Pairs, options: Preference) -> Tensor:
    return _logistic(options.beta * (pairs.chosen - pairs.rejected), options.label_smoothing)


def _robust(pairs: _Pairs, options: Preference) -> Tensor:
    logits, flipped = options.beta * (pairs.chosen - pairs.rejected), options.label_smoothing
    return (-(1 - flipped) * F.logsigmoid(logits) + flipped * F.logsigmoid(-logits)) / (1 - 2 * flipped)


def _ipo(pairs: _Pairs, options: Preference) -> Tensor:
    return (_mean_margin(pairs) - 1 / (2 * options.beta)).square()


def _hinge(pairs: _Pairs, options: Preference) -> Tensor:
    return F.relu(1 - options.beta * (pairs.chosen - pairs.rejected))


def _exo_pair(pairs: _Pairs, options: Preference) -> Tensor:
    logits = options.beta * (pairs.chosen - pairs.rejected)
    wins = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-options.label_smoothing))
    losses = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(options.label_smoothing))
    return wins + losses


def _nca_pair(pairs: _Pairs, options: Preference) -> Tensor:
    chosen, rejected = options.beta * pairs.chosen, options.beta * pairs.rejected
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def _bco_pair(pairs: _Pairs, options: Preference) -> Tensor:
    return -F.logsigmoid(options.beta * pairs.chosen) - F.logsigmoid(-options.beta * pairs.rejected)


def _sppo_hard(pairs: _Pairs, options: Preference) -> Tensor:
    target = 0.5 / options.beta
    return (pairs.chosen - target).square() + (pairs.rejected + target).square()


def _apo_zero(pairs: _Pairs, options: Preference) -> Tensor:
    return torch.sigmoid(-options.beta * pairs.chosen) + torch.sigmoid(options.beta * pairs.rejected)


def _apo_down(pairs: _Pairs, options: Preference) -> Tensor:
    return torch.sigmoid(options.beta * pairs.chosen) + torch.sigmoid(-options.beta * (pairs.chosen - pairs.rejected))


def _aot(pairs: _Pairs, options: Preference) -> Tensor:
    return _in_order(pairs.policy_margin, pairs.reference_margin, pairs.partners, options)


def _aot_unpaired(pairs: _Pairs, options: Preference) -> Tensor:
    return _in_order(pairs.chosen, pairs.rejected, pairs.partners, options)


def _in_order(left: Tensor, right: Tensor, partners: Tensor | None, options: Preference) -> Tensor:
    if partners is None:
        return _logistic(options.beta * (left.sort().values - right.sort().values), options.label_smoothing)
    # Each difference stands here twice, once with the gradient of either side.
    held = _logistic(options.beta * (left - partners[:, 0]), options.label_smoothing)
    held = held + _logistic(options.beta * (partners[:, 1] - right), options.label_smoothing)
    return held - 0.5 * held.detach()


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(stable=True).argsort(stable=True)


def _discopop(pairs: _Pairs, options: Preference) -> Tensor:
    logits = options.beta * (pairs.chosen - pairs.rejected)
    modulation = logits / options.discopop_tau
    # The product m * exp(-logits) in one exponent: alone, the second factor overflows while the first vanishes.
    exponential = exp_bounded(F.logsigmoid(modulation) - logits, 60.0)
    return -F.logsigmoid(logits) * torch.sigmoid(-modulation) + exponential


def _sigmoid_norm(pairs: _Pairs, options: Preference) -> Tensor:
    return _logistic(options.beta * _mean_margin(pairs), options.label_smoothing)


def _sft(pairs: _Pairs, options: Preference) -> Tensor:
    return -_per_token(pairs.policy_chosen, pairs.chosen_lengths)


_LOSSES: dict[str, Callable[[_Pairs, Preference], Tensor]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "ipo": _ipo,
    "hinge": _hinge,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
    "sft": _sft,
}
_SMOOTHED = {"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired"}
_DIVERGENT = {"sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "exo_pair", "discopop"}

PREFERENCE_LOSSES = tuple(_LOSSES)
"""Names that `preference_loss` takes."""
