"""Losses on single completions that are labelled good or bad, unreduced."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
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


def mismatched(prompts: Sequence[Hashable | None], index: Sequence[int] | None = None) -> list[int]:
    """Which completion KTO holds each prompt against: that of the nearest row before it with another prompt.

    Args:
        prompts: What tells prompts apart, one a row, for all rows of an optimizer step; None: the row has no
            completion and takes no part.
        index: Numbers by which the rows are put in order; None: as they stand. The first row follows the last.

    Returns:
        For each row the number of the other; -1 where it takes no part, or all prompts are the same.

    >>> mismatched(["a", "a", "b", None, "c"])
    [4, 4, 1, -1, 2]
    """
    order = [row for row, prompt in enumerate(prompts) if prompt is not None]
    if index is not None:
        order.sort(key=lambda row: index[row])
    others = [-1] * len(prompts)
    for place in range(2 * len(order)):  # twice around: the first rows look back at the last
        row, before = order[place % len(order)], order[place % len(order) - 1]
        others[row] = others[before] if prompts[row] == prompts[before] else before
    return others


def mismatched_completions(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    target_mask: Tensor,
    *,
    index: Sequence[int] | None = None,
    limit: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each prompt the completion that KTO holds it against (`mismatched`).

    Args:
        prompt_ids: `[rows, prompt_time]`, of all rows of an optimizer step.
        prompt_mask: `[rows, prompt_time]`, nonzero at tokens that exist.
        completion_ids: `[rows, time]`.
        completion_mask: `[rows, time]`, nonzero at tokens that exist.
        target_mask: `[rows, time]`, nonzero at those to be scored; a completion without one takes no part.
        index: Numbers by which the rows are put in order; None: as they stand.
        limit: Tokens of a prompt and its completion, beyond which the completion is cut; None: there is no limit.

    Returns:
        Ids, mask of existing and mask of scored tokens `[rows, time]`; both masks False where there is no other row.

    >>> ids, ones = torch.tensor([[1], [2]]), torch.ones(2, 1)
    >>> mismatched_completions(ids, ones, ids + 6, ones, ones)[0].tolist()
    [[8], [7]]
    """
    scored = completion_mask.bool() & target_mask.bool()
    prompts, exists, some = prompt_ids.cpu(), prompt_mask.cpu().bool(), scored.any(dim=1).tolist()
    keys = [tuple(prompts[row][exists[row]].tolist()) if some[row] else None for row in range(len(some))]
    other = torch.tensor(mismatched(keys, index), dtype=torch.int64, device=completion_ids.device)
    kept = completion_mask[other].bool() & (other >= 0)[:, None]
    if limit is not None:
        kept &= kept.cumsum(dim=1) <= limit - prompt_mask.bool().sum(dim=1, keepdim=True)
    return completion_ids[other], kept, kept & scored[other]
