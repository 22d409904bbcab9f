"""Weights for tokens that another distribution sampled than the one that scores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from alignment_modules.functional.checks import check_choice, check_same_shape
from alignment_modules.functional.kl import MAX_LOG_RATIO, binary_kl
from alignment_modules.functional.ranges import Finite, Range, check_options
from alignment_modules.functional.reductions import masked_mean
from alignment_modules.functional.surrogate import per_token_advantages

METRICS = ("ratio", "k1", "k2", "k3", "tv", "binary_kl")
"""What a `Correction` measures of `x = log p_scored - log p_sampled`."""


@dataclass(frozen=True)
class Correction:
    """How tokens count whose sampled and scored log-probabilities differ: `level x metric x action x [low, high]`.

    Sampled are the log-probabilities that the engine drew with, scored those that the trainer computes for the same
    tokens. With `x` their difference, the metric is

    | `metric` | a token | `level="sequence"` | `level="geometric"` |
    |---|---|---|---|
    | "ratio" | `exp(x)` | `exp` of the sum | `exp` of the mean |
    | "k1", "k2", "k3" | `-x`, `x^2 / 2`, `exp(x) - 1 - x`: the KL of sampled from scored | mean over tokens | |
    | "tv" | the difference of the probabilities, its size | mean over tokens | |
    | "binary_kl" | KL of "this token or another" | mean over tokens | |

    "clamp" makes the ratio, held between `low` and `high`, the token's weight. "mask" leaves out what is below `low` or
    above `high`; what stays has the weight 1 or, with `weigh`, the ratio (of its sequence where that is measured, else
    its own).

    Args:
        level: "token", "sequence" or, for the ratio alone, "geometric".
        metric: One of `METRICS`; "clamp" takes the ratio alone.
        action: "clamp" or "mask".
        low: Lower bound, at most what equal distributions have (1 for the ratio, 0 for the others); None: none.
        high: Upper bound, at least that; None: none.
        weigh: Whether "mask" weighs what stays by the ratio; None: where the metric is the ratio.
        where: What "mask" may leave out: "all"; "negative": where the advantage is; "outward": where the advantage
            pushes on in the direction in which the probability already moved.
        against: Which scored log-probabilities: "old", those at the time of the rollout, once for all its updates; or
            "policy", those of each update, whose ratio is in the loss already, so that nothing is weighed by it.

    Raises:
        ValueError: If an option has a value that is not allowed, no effect, or contradicts another.
    """

    level: Literal["token", "sequence", "geometric"] = "token"
    metric: Literal["ratio", "k1", "k2", "k3", "tv", "binary_kl"] = "ratio"
    action: Literal["clamp", "mask"] = "clamp"
    low: Finite | None = None
    high: Annotated[float, Range(0)] | None = None
    weigh: bool | None = None
    where: Literal["all", "negative", "outward"] = "all"
    against: Literal["old", "policy"] = "old"

    def __post_init__(self) -> None:
        check_options(Correction, vars(self), "correction.")
        same, ratio = (1.0, True) if self.metric == "ratio" else (0.0, False)
        wrong = {
            f"level='geometric' needs metric='ratio', got {self.metric!r}": self.level == "geometric" and not ratio,
            f"action='clamp' needs metric='ratio', got {self.metric!r}": self.action == "clamp" and not ratio,
            "low=None and high=None: one of them must be given": self.low is None and self.high is None,
            f"low={self.low}: metric={self.metric!r} is never below 0, so it must be None": (
                self.low is not None and self.metric in ("k2", "k3", "tv", "binary_kl")
            ),
            f"low={self.low} must be 0 or more: metric='ratio' is": ratio and (self.low or 0.0) < 0,
            f"low={self.low} must be at most {same:g}, what equal distributions have": (self.low or 0.0) > same,
            f"high={self.high} must be at least {same:g}, what equal distributions have": (
                self.high is not None and self.high < same
            ),
            f"where={self.where!r} needs action='mask'": self.where != "all" and self.action == "clamp",
            f"weigh={self.weigh} needs action='mask': 'clamp' always weighs": (
                self.weigh is not None and self.action == "clamp"
            ),
            "against='policy' needs action='mask' and weigh=False: the loss's own ratio weighs already": (
                self.against == "policy" and (self.action == "clamp" or self.weighs)
            ),
        }
        for reason, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"correction.{reason}")

    @property
    def weighs(self) -> bool:
        """Whether what stays is weighed by the ratio."""
        if self.action == "clamp":
            return True
        return self.metric == "ratio" if self.weigh is None else self.weigh

    def describe(self) -> str:
        """The correction in words."""
        bounds = " and ".join(
            f"{word} {bound:g}" for word, bound in (("below", self.low), ("above", self.high)) if bound is not None
        )
        measured = f"{self.level}-level {self.metric} of {self.against if self.against == 'policy' else 'old policy'}"
        if self.action == "clamp":
            return f"weighed by the {measured} to sampled, clamped {bounds}"
        of = {"all": "", "negative": ", of negative advantages", "outward": ", pushed further the same way"}[self.where]
        return f"{measured} to sampled masked {bounds}{of}{', the others weighed by it' if self.weighs else ''}"

    @torch.no_grad()
    def __call__(self, sampled_logps: Tensor, scored_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """The weight of each token's loss.

        Args:
            sampled_logps: `[batch, time]`, that the engine drew with, in nats.
            scored_logps: `[batch, time]`, that the trainer computes.
            advantages: `[batch]` or `[batch, time]`; only their sign is read.
            mask: `[batch, time]`, bool or 0/1. Sequences are its tokens.

        Returns:
            `[batch, time]` without gradient, float32 or wider, 0 outside the mask and where a log-probability is not
            finite (of a sequence: of one of its tokens). Log-ratios are bounded to [-20, 20].

        Raises:
            ValueError: If shapes do not fit.

        >>> sampled, scored = torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.0, -1.0]])
        >>> CORRECTIONS["tis"](sampled, scored, torch.ones(1), torch.ones(1, 2))
        tensor([[2., 1.]])
        """
        check_same_shape(sampled_logps=sampled_logps, scored_logps=scored_logps, mask=mask)
        weight, mask = per_token_advantages(advantages, scored_logps), mask.bool()
        dtype = torch.promote_types(scored_logps.dtype, torch.float32)
        finite = sampled_logps.isfinite() & scored_logps.isfinite()
        sampled, scored = (torch.where(mask & finite, logps, 0.0).to(dtype) for logps in (sampled_logps, scored_logps))
        log_ratio = _at_level(scored - sampled, mask, self.level, is_ratio=self.metric == "ratio")
        if self.level != "token":
            finite = (finite | ~mask).all(dim=1, keepdim=True).expand_as(mask)
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if self.action == "clamp":
            return ratio.clamp(self.low, self.high).masked_fill(~(mask & finite), 0)
        measured = ratio if self.metric == "ratio" else self._measure(sampled, scored, mask)
        outside = torch.zeros_like(mask)
        if self.low is not None:
            outside = outside | (measured < self.low)
        if self.high is not None:
            outside = outside | (measured > self.high)
        if self.where == "negative":
            outside = outside & (weight < 0)
        elif self.where == "outward":
            outside = outside & (weight * log_ratio > 0)
        own = (scored - sampled).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        kept = torch.ones_like(ratio) if not self.weighs else ratio if self._weighs_sequences else own
        return kept.masked_fill(outside | ~(mask & finite), 0)

    @property
    def _weighs_sequences(self) -> bool:
        return self.level == "sequence" and self.metric == "ratio"

    def _measure(self, sampled: Tensor, scored: Tensor, mask: Tensor) -> Tensor:
        x = (scored - sampled).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        if self.metric == "k1":
            measured = -x
        elif self.metric == "k2":
            measured = 0.5 * x.square()
        elif self.metric == "k3":
            measured = x.expm1() - x
        elif self.metric == "tv":
            measured = (scored.exp() - sampled.exp()).abs()
        else:
            measured = binary_kl(sampled, scored)
        return measured if self.level == "token" else masked_mean(measured, mask)[:, None].expand_as(measured)


def correction_statistics(weights: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The share of tokens that a correction leaves out, and the mean weight of all, as `name -> (total, weight)`.

    Args:
        weights: `[batch, time]`, what a `Correction` gives.
        mask: `[batch, time]` bool.
    """
    count = mask.sum()
    masked, weight = (mask & (weights == 0)).sum(), torch.where(mask, weights, 0.0).sum()
    return {"correction/masked": (masked, count), "correction/weight": (weight, count)}


def _at_level(log_ratio: Tensor, mask: Tensor, level: str, *, is_ratio: bool) -> Tensor:
    """The log-ratio of what is measured: a token's, a sequence's sum or mean."""
    if level == "token":
        return log_ratio
    mean = level == "geometric" or not is_ratio
    found = masked_mean(log_ratio, mask) if mean else torch.where(mask, log_ratio, 0.0).sum(dim=-1)
    return found[:, None].expand_as(log_ratio)


CORRECTIONS = {
    "tis": Correction(high=2.0),
    "tis_sequence": Correction("sequence", high=2.0),
    "icepop": Correction(action="mask", low=0.5, high=5.0),
    "mis": Correction("sequence", action="mask", high=3.0),
    "geo_rs": Correction("geometric", action="mask", low=0.999, high=1.002),
    "k3_rs": Correction("sequence", "k3", "mask", high=0.01),
    "opsm": Correction("sequence", "k1", "mask", high=1e-4, where="negative", against="policy"),
    "dppo_tv": Correction("token", "tv", "mask", high=0.2, where="outward", against="policy"),
    "dppo_kl": Correction("token", "binary_kl", "mask", high=0.05, where="outward", against="policy"),
}
"""Published corrections by name.

| name | what it is | source |
|---|---|---|
| "tis", "tis_sequence" | truncated importance sampling | arXiv:1802.01561 (V-trace's truncated weights) |
| "icepop" | masked importance sampling, token by token | Ring-1T, arXiv:2510.18855 |
| "mis" | the same of sequences, as TRL has it by default | |
| "geo_rs" | rejection of sequences by the geometric mean, tokens weighed by their own ratio | |
| "k3_rs" | rejection of sequences by the mean k3 | |
| "opsm" | off-policy sequences of negative advantage masked | DeepSeek-V3.2, arXiv:2512.02556 |
| "dppo_tv", "dppo_kl" | the trust region of DPPO around any loss | arXiv:2602.04879 |
"""


def as_correction(correction: str | Mapping[str, Any] | Correction | None) -> Correction | None:
    """A correction by its name, by its options, or as it is.

    Raises:
        ValueError: If there is none of that name, or an option is unknown or has a value that is not allowed.
    """
    if isinstance(correction, str):
        return CORRECTIONS[check_choice("correction", correction, CORRECTIONS)]
    if not isinstance(correction, Mapping):
        return correction
    for name in correction:
        check_choice("correction", name, [field.name for field in fields(Correction)])
    return Correction(**correction)
