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
    margin = options.beta * (pairs.chosen - pairs.rejected)
    return torch.sigmoid(options.beta * pairs.chosen) + torch.sigmoid(-margin)


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


LOSSES: dict[str, Callable[[Pairs, Options], Tensor]] = {
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
SMOOTHED = frozenset({"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired"})
"""Those with a term for labels that are wrong."""

OF_DIFFERENCES = frozenset({"sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "exo_pair", "discopop"})
"""Those written in the difference of the two sides' scores."""

SORTED = frozenset({"aot", "aot_unpaired"})
"""Those that sort the pairs they are given."""
