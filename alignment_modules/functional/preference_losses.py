"""The formulas of the losses on pairs that have a reference, each on what all of them are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment_modules.functional.kl import exp_bounded


class Pairs(NamedTuple):
    """One batch of pairs, all `[batch]`."""

    chosen: Tensor  # log p - log p_ref
    rejected: Tensor
    chosen_score: Tensor  # what differences are taken of: the same, or another f-divergence's score of it
    rejected_score: Tensor
    offset: Tensor | float  # what differences have to exceed, in nats
    policy_chosen: Tensor
    policy_margin: Tensor
    reference_margin: Tensor
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    partners: Tensor | None

    @property
    def difference(self) -> Tensor:
        """Of the sums."""
        return self.chosen_score - self.rejected_score - self.offset

    @property
    def mean_difference(self) -> Tensor:
        """Of the means over tokens."""
        means = per_token(self.chosen_score, self.chosen_lengths), per_token(self.rejected_score, self.rejected_lengths)
        return means[0] - means[1] - self.offset


class Options(Protocol):
    """What the formulas have free."""

    @property
    def beta(self) -> float:
        """Strength of the pull to the reference."""

    @property
    def label_smoothing(self) -> float:
        """Assumed share of wrong labels."""

    @property
    def discopop_tau(self) -> float:
        """Temperature of "discopop"."""

    @property
    def ipo_logps(self) -> str:
        """Whether "ipo" compares means or sums."""


def per_token(logps: Tensor, lengths: Tensor | None) -> Tensor:
    """Means over tokens; as they are where the lengths are not known."""
    return logps if lengths is None else logps / lengths.clamp(min=1)


def _logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def _sigmoid(pairs: Pairs, options: Options) -> Tensor:
    return _logistic(options.beta * pairs.difference, options.label_smoothing)


def _robust(pairs: Pairs, options: Options) -> Tensor:
    logits, flipped = options.beta * pairs.difference, options.label_smoothing
    return (-(1 - flipped) * F.logsigmoid(logits) + flipped * F.logsigmoid(-logits)) / (1 - 2 * flipped)


def _ipo(pairs: Pairs, options: Options) -> Tensor:
    difference = pairs.mean_difference if options.ipo_logps == "mean" else pairs.difference
    return (difference - 1 / (2 * options.beta)).square()


def _hinge(pairs: Pairs, options: Options) -> Tensor:
    return F.relu(1 - options.beta * pairs.difference)


def _exo_pair(pairs: Pairs, options: Options) -> Tensor:
    logits = options.beta * pairs.difference
    wins = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-options.label_smoothing))
    losses = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(options.label_smoothing))
    return wins + losses


def _nca_pair(pairs: Pairs, options: Options) -> Tensor:
    chosen, rejected = options.beta * pairs.chosen, options.beta * pairs.rejected
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def _bco_pair(pairs: Pairs, options: Options) -> Tensor:
    return -F.logsigmoid(options.beta * pairs.chosen) - F.logsigmoid(-options.beta * pairs.rejected)


def _sppo_hard(pairs: Pairs, options: Options) -> Tensor:
    target = 0.5 / options.beta
    return (pairs.chosen - target).square() + (pairs.rejected + target).square()


def _apo_zero(pairs: Pairs, options: Options) -> Tensor:
    return torch.sigmoid(-options.beta * pairs.chosen) + torch.sigmoid(options.beta * pairs.rejected)


def _apo_down(pairs: Pairs, options: Options) -> Tensor:
    return torch.sigmoid(options.beta * pairs.chosen) + torch.sigmoid(-options.beta * pairs.difference)


def _aot(pairs: Pairs, options: Options) -> Tensor:
    return _in_order(pairs.policy_margin, pairs.reference_margin, pairs.partners, options)


def _aot_unpaired(pairs: Pairs, options: Options) -> Tensor:
    return _in_order(pairs.chosen, pairs.rejected, pairs.partners, options)


def _in_order(left: Tensor, right: Tensor, partners: Tensor | None, options: Options) -> Tensor:
    if partners is None:
        return _logistic(options.beta * (left.sort().values - right.sort().values), options.label_smoothing)
    # Each difference stands here twice, once with the gradient of either side.
    held = _logistic(options.beta * (left - partners[:, 0]), options.label_smoothing)
    held = held + _logistic(options.beta * (partners[:, 1] - right), options.label_smoothing)
    return held - 0.5 * held.detach()


def _discopop(pairs: Pairs, options: Options) -> Tensor:
    logits = options.beta * pairs.difference
    modulation = logits / options.discopop_tau
    # The product m * exp(-logits) in one exponent: alone, the second factor overflows while the first vanishes.
    exponential = exp_bounded(F.logsigmoid(modulation) - logits, 60.0)
    return -F.logsigmoid(logits) * torch.sigmoid(-modulation) + exponential


def _sigmoid_norm(pairs: Pairs, options: Options) -> Tensor:
    return _logistic(options.beta * pairs.mean_difference, options.label_smoothing)


def _sft(pairs: Pairs, options: Options) -> Tensor:
    return -per_token(pairs.policy_chosen, pairs.chosen_lengths)


class PairLoss(NamedTuple):
    """A loss of the family.

    Attributes:
        formula: Gives `[batch]`.
        smoothed: Whether it has a term for labels that are wrong.
        of_difference: Whether it is written in the difference of the two sides' scores.
        of_means: Whether it takes means over tokens; "ipo" sums, where these are asked for.
        sorts: Whether it sorts the pairs that it is given.
    """

    formula: Callable[[Pairs, Options], Tensor]
    smoothed: bool = False
    of_difference: bool = False
    of_means: bool = False
    sorts: bool = False


LOSSES = {
    "sigmoid": PairLoss(_sigmoid, smoothed=True, of_difference=True),
    "robust": PairLoss(_robust, smoothed=True, of_difference=True),
    "ipo": PairLoss(_ipo, of_difference=True, of_means=True),
    "hinge": PairLoss(_hinge, of_difference=True),
    "exo_pair": PairLoss(_exo_pair, smoothed=True, of_difference=True),
    "nca_pair": PairLoss(_nca_pair),
    "bco_pair": PairLoss(_bco_pair),
    "sppo_hard": PairLoss(_sppo_hard),
    "apo_zero": PairLoss(_apo_zero),
    "apo_down": PairLoss(_apo_down, of_difference=True),
    "aot": PairLoss(_aot, smoothed=True, sorts=True),
    "aot_unpaired": PairLoss(_aot_unpaired, smoothed=True, sorts=True),
    "discopop": PairLoss(_discopop, of_difference=True),
    "sigmoid_norm": PairLoss(_sigmoid_norm, smoothed=True, of_difference=True, of_means=True),
    "sft": PairLoss(_sft, of_means=True),
}
SMOOTHED = frozenset(name for name, loss in LOSSES.items() if loss.smoothed)
OF_DIFFERENCES = frozenset(name for name, loss in LOSSES.items() if loss.of_difference)
SORTED = frozenset(name for name, loss in LOSSES.items() if loss.sorts)
