"""Preference losses on pairs of completions, unreduced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment_modules.functional.checks import check_choice, check_same_shape
from alignment_modules.functional.kl import exp_bounded
from alignment_modules.functional.logprobs import sequence_logps
from alignment_modules.functional.preference_losses import LOSSES, OF_DIFFERENCES, SMOOTHED, SORTED, Pairs
from alignment_modules.functional.ranges import NonNegative, Positive, Range, Share, check_options

PREFERENCE_LOSSES = tuple(LOSSES)
"""Names that `preference_loss` takes."""

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
"""Names that `preference_loss` takes as `f_divergence`."""

BATCH_COUPLED_LOSSES = SORTED
"""Losses that sort the pairs they are given: for a part of them, say by `Preference.partners` what the whole is."""


class _Side(NamedTuple):
    """A completion of each pair, all `[batch]`."""

    policy: Tensor
    reference: Tensor
    lengths: Tensor | None


@dataclass(frozen=True)
class Preference:
    """How pairs of completions are compared, as one value that checks itself.

    Args:
        loss: One of `PREFERENCE_LOSSES`, or several, whose weighted sum is taken (MPO, arXiv:2411.10442).
        beta: Strength of the pull to the reference, > 0 (`tau` for "ipo").
        label_smoothing: Assumed share of wrong labels, in [0, 0.5); > 0 for "exo_pair". It belongs to the losses that
            have such a term, and is 0 where none has.
        f_divergence: One of `F_DIVERGENCES`; it belongs to the losses that are written in `w - l`, and is "reverse_kl"
            where none is.
        alpha: Coefficient of the alpha-divergence, in [0, 1]; 1 is "reverse_kl", 0 is "forward_kl".
        discopop_tau: Temperature of "discopop", > 0.
        weights: A weight >= 0 for each of several losses; None: 1 each.
        dpop_coef: `lambda` of DPO-Positive (arXiv:2402.13228, eq. 3): `w - l` becomes `w - l - lambda max(0, -w)`, so
            that the chosen completion is not made less likely than under the reference. Likewise of losses in `w - l`.
        ipo_logps: Whether "ipo" compares the completions' "mean" or "sum" over tokens.

    Raises:
        ValueError: If an option is unknown, out of range, or without effect on every loss.
    """

    loss: str | Sequence[str] = "sigmoid"
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Range(0, 0.5, "[)")] = 0.0
    f_divergence: str = "reverse_kl"
    alpha: Share = 0.5
    discopop_tau: Positive = 0.05
    weights: Sequence[float] | None = None
    dpop_coef: NonNegative = 0.0
    ipo_logps: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError("loss=[] names no loss")
        for name in self.losses:
            check_choice("loss", name, PREFERENCE_LOSSES)
        check_choice("f_divergence", self.f_divergence, F_DIVERGENCES)
        check_choice("ipo_logps", self.ipo_logps, ("mean", "sum"))
        check_options(
            Preference, {name: value for name, value in vars(self).items() if name not in ("loss", "weights")}
        )
        self._check_weights()
        self._check_use("label_smoothing", self.label_smoothing, 0, SMOOTHED, "has no such term")
        self._check_use("f_divergence", self.f_divergence, "reverse_kl", OF_DIFFERENCES, "takes no difference")
        self._check_use("dpop_coef", self.dpop_coef, 0, OF_DIFFERENCES, "takes no difference")
        self._check_use("ipo_logps", self.ipo_logps, "mean", {"ipo"}, "is another")
        self._check_use("discopop_tau", self.discopop_tau, 0.05, {"discopop"}, "is another")
        if self.alpha != 0.5 and self.f_divergence != "alpha":
            raise ValueError(
                f"alpha={self.alpha} is the coefficient of f_divergence='alpha', got f_divergence={self.f_divergence!r}"
            )
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ValueError("label_smoothing must be > 0 for loss='exo_pair' (its paper uses 1e-3), got 0")
        if self.dpop_coef and self.f_divergence != "reverse_kl":
            raise ValueError(
                f"dpop_coef={self.dpop_coef} is written in log-ratios: leave f_divergence at 'reverse_kl', got "
                f"{self.f_divergence!r}"
            )
        if self.sorts and len(self.losses) > 1:
            raise ValueError(
                f"loss={list(self.losses)}: {', '.join(sorted(SORTED))} sort the pairs of a step and stand alone"
            )

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of the losses."""
        return (self.loss,) if isinstance(self.loss, str) else tuple(self.loss)

    @property
    def sorts(self) -> bool:
        """Whether pairs are sorted, so that a part of them has to be told its partners."""
        return not SORTED.isdisjoint(self.losses)

    @property
    def of_means(self) -> tuple[str, ...]:
        """The losses that take means over tokens; the others take sums."""
        means = [name for name in self.losses if LOSSES[name].of_means]
        return tuple(name for name in means if name != "ipo" or self.ipo_logps == "mean")

    @property
    def normalised(self) -> bool:
        """Whether a loss compares means over tokens; else all compare sums."""
        return not OF_DIFFERENCES.isdisjoint(self.of_means)

    def _check_weights(self) -> None:
        given = self.weights
        if given is not None and (isinstance(self.loss, str) or len(given) != len(self.losses)):
            raise ValueError(
                f"loss_weights={list(given)} must be one weight for each of several losses, got loss={self.loss!r}"
            )
        for weight in given or ():
            if isinstance(weight, bool) or weight not in Range(0):
                raise ValueError(f"loss_weights={list(given or ())}: {weight!r} must be a number of 0 or more")
        if given is not None and not any(given):
            raise ValueError(f"loss_weights={list(given)}: one of them must be above 0")

    def _check_use(self, name: str, value: object, default: object, users: set[str] | frozenset[str], why: str) -> None:
        if value != default and users.isdisjoint(self.losses):
            shown = repr(self.losses[0]) if len(self.losses) == 1 else list(self.losses)
            raise ValueError(
                f"{name} must be {default!r} for loss={shown}, which {why}, got {value!r}; others are used by "
                f"{', '.join(sorted(users))}"
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
        labels: Tensor | None = None,
        margins: Tensor | None = None,
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
            labels: `[batch]` or None.
            margins: `[batch]` or None.
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
        columns = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        for name, column in (columns | {"labels": labels, "margins": margins}).items():
            if column is not None:
                check_same_shape(**{"policy_chosen_logps": policy_chosen_logps, name: column})
        if (chosen_lengths is None) != (rejected_lengths is None) and self.losses != ("sft",):
            raise ValueError("chosen_lengths and rejected_lengths must be given together")
        self._check_columns(labels, margins)
        chosen = _Side(policy_chosen_logps, reference_chosen_logps.detach(), chosen_lengths)
        rejected = _Side(policy_rejected_logps, reference_rejected_logps.detach(), rejected_lengths)
        offset = 0.0 if margins is None else margins.detach() / self.beta
        losses = self._losses(chosen, rejected, offset, partners)
        if labels is None:
            return losses
        return labels * losses + (1 - labels) * self._losses(rejected, chosen, offset, None)

    def _check_columns(self, labels: Tensor | None, margins: Tensor | None) -> None:
        shown = repr(self.loss) if isinstance(self.loss, str) else list(self.loss)
        if labels is not None and self.sorts:
            raise ValueError(f"label: loss={shown} sorts the pairs, and knows no probability of a single one's order")
        if margins is not None and OF_DIFFERENCES.isdisjoint(self.losses):
            raise ValueError(
                f"margin: loss={shown} takes no difference that could have one; those that do are "
                f"{', '.join(sorted(OF_DIFFERENCES))}"
            )
        if labels is not None and margins is not None:
            raise ValueError("label and margin contradict each other: a margin is of a pair whose order is known")

    def _losses(self, chosen: _Side, rejected: _Side, offset: Tensor | float, partners: Tensor | None) -> Tensor:
        """The weighted sum of all losses, `[batch]`."""
        w, l = chosen.policy - chosen.reference, rejected.policy - rejected.reference  # noqa: E741
        score = _divergence_score(w, self.f_divergence, self.alpha)
        pairs = Pairs(
            chosen=w,
            rejected=l,
            chosen_score=score - self.dpop_coef * F.relu(-w) if self.dpop_coef else score,
            rejected_score=_divergence_score(l, self.f_divergence, self.alpha),
            offset=offset,
            policy_chosen=chosen.policy,
            policy_margin=chosen.policy - rejected.policy,
            reference_margin=chosen.reference - rejected.reference,
            chosen_lengths=chosen.lengths,
            rejected_lengths=rejected.lengths,
            partners=partners,
        )
        first, *others = (LOSSES[name].formula(pairs, self) for name in self.losses)
        if self.weights is None:
            return sum(others, start=first)
        weighted = (weight * values for weight, values in zip(self.weights, (first, *others), strict=True))
        return sum(weighted, start=torch.zeros_like(first))

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
        if self.losses == ("aot",):
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
    loss: str | Sequence[str] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
    discopop_tau: float = 0.05,
    weights: Sequence[float] | None = None,
    dpop_coef: float = 0.0,
    ipo_logps: Literal["mean", "sum"] = "mean",
    labels: Tensor | None = None,
    margins: Tensor | None = None,
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
        loss: One of `PREFERENCE_LOSSES`, or several, whose weighted sum is taken.
        beta: As in `Preference`, and so are the others.
        label_smoothing: Assumed share of wrong labels.
        chosen_lengths: `[batch]`, tokens of each chosen completion, for `ipo`, `sigmoid_norm` and `sft`. None: their
            log-probabilities are taken as they are, averages or sums.
        rejected_lengths: `[batch]`, likewise.
        f_divergence: One of `F_DIVERGENCES` (arXiv:2309.16240): replaces `w` and `l` by its score where the formula
            has them through their difference.
        alpha: Coefficient of the alpha-divergence.
        discopop_tau: Temperature of `discopop`.
        weights: A weight for each of several losses; None: 1 each.
        dpop_coef: Weight of DPO-Positive's penalty.
        ipo_logps: Whether `ipo` compares means over tokens, as above, or sums.
        labels: `[batch]`, the probability that the chosen completion is the better one: the loss is then the expected
            one, `labels * loss(w, l) + (1 - labels) * loss(l, w)`. None: it is certain.
        margins: `[batch]`, what `beta (w - l)` has to exceed (ODPO, arXiv:2402.10571): taken from it in the losses
            that are written in it.

    Returns:
        `[batch]`.

    Raises:
        ValueError: If shapes differ, or an option is unknown, out of range, or without effect on this loss.

    >>> zero = torch.zeros(1)
    >>> preference_loss(zero, zero, zero, zero)
    tensor([0.6931])
    """
    preference = Preference(
        loss, beta, label_smoothing, f_divergence, alpha, discopop_tau, weights, dpop_coef, ipo_logps
    )
    return preference(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        labels=labels,
        margins=margins,
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
        `[batch]`, in the dtype of `sequence_logps`.

    Raises:
        ValueError: If shapes differ or `ld_alpha` is outside [0, 1].

    >>> length_desensitized_logps(-torch.ones(1, 4), torch.ones(1, 4), torch.tensor([2]), ld_alpha=0.25)
    tensor([-2.5000], dtype=torch.float64)
    """
    check_same_shape(token_logps=token_logps, mask=mask)
    check_options(length_desensitized_logps, locals())
    mask = mask.bool()
    shared = mask.cumsum(dim=1) <= shared_lengths[:, None]
    weights = torch.where(shared, 1.0, ld_alpha).to(token_logps.dtype)
    return sequence_logps(token_logps.masked_fill(~mask, 0) * weights)


def _divergence_score(log_ratio: Tensor, f_divergence: str, alpha: float) -> Tensor:
    """`f'(p / p_ref)` up to a constant that drops out of differences."""
    if f_divergence == "forward_kl":
        f_divergence, alpha = "alpha", 0.0
    if f_divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    if f_divergence == "alpha" and abs(alpha - 1) > 1e-6:
        return (exp_bounded((alpha - 1) * log_ratio, 40.0) - 1) / (alpha - 1)
    return log_ratio


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(stable=True).argsort(stable=True)
