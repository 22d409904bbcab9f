"""Preference losses that need no reference: the odds ratio of ORPO, and the family of CPO, SimPO and AlphaPO."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment_modules.functional.checks import check_choice, check_same_shape
from alignment_modules.functional.kl import exp_bounded
from alignment_modules.functional.preference import Preference
from alignment_modules.functional.preference_losses import LOSSES
from alignment_modules.functional.ranges import Finite, NonNegative, Positive, Range, check_options

ReferenceFreeLoss = Literal["sigmoid", "hinge", "ipo", "simpo"]
"""One of `REFERENCE_FREE_LOSSES`, as a type."""

REFERENCE_FREE_LOSSES = get_args(ReferenceFreeLoss)
"""Names that `reference_free_loss` takes."""


class ReferenceFree(NamedTuple):
    """A loss of this family.

    Attributes:
        preference: Which of `PREFERENCE_LOSSES` it is, with a reference that finds all completions equally likely.
        of_means: Whether it is meant for means over tokens; else for sums.
        has_margin: Whether it has a target margin.
    """

    preference: str
    of_means: bool = False
    has_margin: bool = False


FORMS: dict[str, ReferenceFree] = {
    "sigmoid": ReferenceFree("sigmoid"),
    "hinge": ReferenceFree("hinge"),
    "ipo": ReferenceFree("ipo", of_means=True),
    "simpo": ReferenceFree("sigmoid", of_means=True, has_margin=True),
}

_MAX_EXPONENT = 40.0  # AlphaPO's power is bounded as that of the alpha-divergence is


def log_odds(mean_logps: Tensor) -> Tensor:
    """`log(p / (1 - p))` of the mean token probability `p = exp(mean_logps)`, without cancellation.

    Args:
        mean_logps: `[batch]`, mean log-probabilities over tokens, <= 0. Probabilities that round to 1 count as one
            rounding step less, so that the result is finite.

    Returns:
        `[batch]`.

    >>> log_odds(torch.tensor([0.5]).log())
    tensor([0.])
    """
    below = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    near = below > -math.log(2)
    # Each branch is computed where it is exact only, so that the other one's infinities reach no gradient.
    small = torch.where(near, below, -0.5)
    large = torch.where(near, -1.0, below)
    log_complement = torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
    return below - log_complement


def odds_ratio_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """`-log s(log odds(chosen) - log odds(rejected))`, the odds ratio's term of ORPO (arXiv:2403.07691, eq. 7).

    Args:
        chosen_mean_logps: `[batch]`, the chosen completions' mean log-probabilities over tokens, in nats.
        rejected_mean_logps: `[batch]`, the rejected ones'.

    Returns:
        `[batch]`, without the weight (`lambda` in the paper) that it has beside the negative log-likelihood.

    Raises:
        ValueError: If shapes differ.

    >>> odds_ratio_loss(torch.tensor([-1.0]), torch.tensor([-1.0]))
    tensor([0.6931])
    """
    check_same_shape(chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    return -F.logsigmoid(log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps))


def check_reference_free(*, loss: str, label_smoothing: float, gamma: float) -> None:
    """Checks that no option is without effect.

    Args:
        loss: One of `REFERENCE_FREE_LOSSES`.
        label_smoothing: As in `reference_free_loss`.
        gamma: As in `reference_free_loss`.

    Raises:
        ValueError: If the loss is unknown, or has no term that an option belongs to.
    """
    check_choice("loss", loss, REFERENCE_FREE_LOSSES)
    smoothed = [name for name, form in FORMS.items() if LOSSES[form.preference].smoothed]
    if label_smoothing and loss not in smoothed:
        raise ValueError(
            f"label_smoothing must be 0 for loss={loss!r}, which has no such term, got {label_smoothing}; it is used "
            f"by {', '.join(smoothed)}"
        )
    if gamma and not FORMS[loss].has_margin:
        having = ", ".join(name for name, form in FORMS.items() if form.has_margin)
        raise ValueError(
            f"gamma must be 0 for loss={loss!r}, which has no target margin, got {gamma}; {having} has one"
        )


def reference_free_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    loss: str = "sigmoid",
    beta: Positive,
    label_smoothing: Annotated[float, Range(0, 0.5, "[)")] = 0.0,
    gamma: NonNegative = 0.0,
    alpha: Finite = 0.0,
) -> Tensor:
    """Loss of each pair of completions, from the policy's log-probabilities alone.

    With `d` the chosen log-probability less the rejected one, `s` the sigmoid and `e` `label_smoothing`:

    | loss | formula | source |
    |---|---|---|
    | `sigmoid` | `-(1 - e) log s(beta d) - e log s(-beta d)` | CPO, arXiv:2401.08417, eq. 3 |
    | `hinge` | `max(0, 1 - beta d)` | SLiC, arXiv:2305.10425 |
    | `ipo` | `(d - 1 / (2 beta))^2` | arXiv:2310.12036, without a reference |
    | `simpo` | `sigmoid` of `beta d - gamma`, for mean log-probabilities | SimPO, arXiv:2405.14734, eq. 6 |

    Args:
        chosen_logps: `[batch]`, log-probabilities of the chosen completions in nats: sums over tokens, or means.
        rejected_logps: `[batch]`, the rejected ones'.
        loss: One of `REFERENCE_FREE_LOSSES`.
        beta: Scale of the difference, > 0.
        label_smoothing: Assumed share of wrong labels, in [0, 0.5).
        gamma: SimPO's target margin, >= 0, inside beta: `beta * (d - gamma / beta)`.
        alpha: Where not 0, `(1 - p^-alpha) / alpha` takes the place of `log p` (AlphaPO, arXiv:2501.03884), with every
            loss. It is meant for mean log-probabilities.

    Returns:
        `[batch]`.

    Raises:
        ValueError: If shapes differ, or an option is unknown, out of range, or without effect on this loss.

    >>> reference_free_loss(torch.tensor([-1.0]), torch.tensor([-1.0]), loss="simpo", beta=2.0, gamma=1.0)
    tensor([1.3133])
    """
    check_options(reference_free_loss, locals())
    check_reference_free(loss=loss, label_smoothing=label_smoothing, gamma=gamma)
    check_same_shape(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    preference = Preference(FORMS[loss].preference, beta, label_smoothing)
    same = torch.zeros_like(chosen_logps)
    chosen, rejected = _alpha_reward(chosen_logps, alpha), _alpha_reward(rejected_logps, alpha)
    return preference(chosen, rejected, same, same, margins=torch.full_like(same, gamma) if gamma else None)


def _alpha_reward(logps: Tensor, alpha: float) -> Tensor:
    """`(1 - p^-alpha) / alpha`, whose limit at 0 is `log p`."""
    if alpha == 0:
        return logps
    exponent = -alpha * logps
    # expm1 keeps the digits of a small power, the bounded exponential the gradient of a large one finite.
    return (
        -torch.where(exponent < 1, torch.expm1(exponent.clamp(max=1)), exp_bounded(exponent, _MAX_EXPONENT) - 1) / alpha
    )
