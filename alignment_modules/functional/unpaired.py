"""Losses on single completions that are labelled good or bad, unreduced."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from alignment_modules.functional.checks import check_same_shape
from alignment_modules.functional.ranges import NonNegative, Positive, check_options

UnpairedLoss = Literal["kto", "apo_zero_unpaired"]
"""Names that `unpaired_loss` takes."""


def unpaired_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    kl: Tensor | float | None,
    *,
    loss: UnpairedLoss = "kto",
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Tensor:
    """Loss of each completion.

    With the log-ratio `r = log p - log p_ref`, `z` the divergence `kl`, `s` the sigmoid and `v` the label's weight:

    | loss | desirable | undesirable | source |
    |---|---|---|---|
    | `kto` | `v (1 - s(beta (r - z)))` | `v (1 - s(beta (z - r)))` | arXiv:2402.01306 |
    | `apo_zero_unpaired` | `v (1 - s(beta r))` | `v s(beta r)` | arXiv:2408.06266, eq. 7, one term a completion |

    Args:
        policy_logps: `[batch]`, log-probabilities summed over tokens, in nats.
        reference_logps: `[batch]`, under the reference; treated as constant.
        labels: `[batch]`, bool or 0/1: whether the completion is desirable.
        kl: 0-dim tensor or number, how far the policy is from the reference: the mean log-ratio of mismatched pairs of
            prompt and completion over the whole optimizer step, at least 0; treated as constant. Only "kto" reads it.
        loss: "kto" or "apo_zero_unpaired".
        beta: Strength of the pull to the reference, > 0.
        desirable_weight: Weight of desirable completions.
        undesirable_weight: Weight of the others. The paper advises a ratio of the two that makes the weighted counts of
            desirable and undesirable completions lie between 1:1 and 4:3.

    Returns:
        `[batch]`.

    Raises:
        ValueError: If shapes differ, an option is not allowed, or "kto" gets no `kl`.

    >>> unpaired_loss(torch.zeros(2), torch.zeros(2), torch.tensor([True, False]), 0.0)
    tensor([0.5000, 0.5000])
    """
    check_options(unpaired_loss, locals())
    check_same_shape(policy_logps=policy_logps, reference_logps=reference_logps, labels=labels)
    ratio, desirable = policy_logps - reference_logps.detach(), labels.bool()
    if loss == "kto":
        if kl is None:
            raise ValueError("loss='kto' needs kl, the mean log-ratio of mismatched pairs")
        ratio = ratio - torch.as_tensor(kl, dtype=ratio.dtype, device=ratio.device).detach()
    # sigmoid(-x) is 1 - sigmoid(x) without its rounding
    return torch.where(
        desirable, desirable_weight * torch.sigmoid(-beta * ratio), undesirable_weight * torch.sigmoid(beta * ratio)
    )
