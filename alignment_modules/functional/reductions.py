"""Reductions of per-token losses to a sum and a count.

A mean of means depends on how a step was cut into micro-batches and ranks; a sum and a count do not. Add both up over
all pieces of an optimizer step, then divide once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignment_modules.functional.checks import check_choice, check_positive, check_same_shape
from alignment_modules.functional.statistics import RowSums

REDUCTIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_sum_norm",
    "prompt_mean",
)
"""Names that `aggregate` takes."""


def aggregate(
    values: Tensor,
    mask: Tensor,
    *,
    reduction: str,
    max_length: int | None = None,
    group_size: int | None = None,
    prompt_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum `values` over its units and count these; `total / weight` is the reduced loss.

    | reduction | total | weight |
    |---|---|---|
    | `token_mean` (DAPO, arXiv:2503.14476) | sum over tokens | tokens |
    | `sequence_mean_token_mean` (GRPO, arXiv:2402.03300) | sum over sequences of their token mean | sequences |
    | `sequence_mean_token_sum` (RLOO, arXiv:2402.14740) | sum over tokens | sequences |
    | `sequence_mean_token_sum_norm` (Dr. GRPO, arXiv:2503.20783) | sum over tokens / `max_length` | sequences |
    | `prompt_mean` (DAPO's equation 8) | sum over prompts of the token mean over their rows | prompts |

    Sequences and prompts without a single token are not counted. With nothing to count, `total` is 0 and still
    connected to the graph of `values`. What `values` holds outside the mask, NaN included, has no influence.

    Args:
        values: `[batch, time]`.
        mask: `[batch, time]`, bool or 0/1.
        reduction: One of `REDUCTIONS`.
        max_length: Constant of `sequence_mean_token_sum_norm`, in tokens; ignored by the others.
        group_size: Rows of a prompt, which lie together; ignored by all but `prompt_mean`, which needs this or ...
        prompt_tokens: `[batch]`, for each row the tokens of all rows of its prompt, wherever they are: a prompt's rows
            may then be cut apart, and each brings its share of the prompt's weight.

    Returns:
        `(total, weight)`, two 0-dim tensors: `total` in the dtype of `values`, `weight` in float32 or wider and without
        gradient.

    Raises:
        ValueError: If the reduction is unknown, lacks its constant, or shapes do not fit.

    >>> aggregate(torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 0, 0]]), reduction="token_mean")
    (tensor(4.), tensor(4.))
    """
    sums = aggregate_rows(
        values, mask, reduction=reduction, max_length=max_length, group_size=group_size, prompt_tokens=prompt_tokens
    )
    return sums.totals.sum(), sums.weights.sum()


def aggregate_rows(
    values: Tensor,
    mask: Tensor,
    *,
    reduction: str,
    max_length: int | None = None,
    group_size: int | None = None,
    prompt_tokens: Tensor | None = None,
) -> RowSums:
    """What each row adds to both sums of `aggregate`: `[batch]`, or `[prompts]` where `group_size` says what is one.

    Args:
        values: As in `aggregate`.
        mask: Likewise.
        reduction: Likewise.
        max_length: Likewise.
        group_size: Likewise.
        prompt_tokens: Likewise.

    Raises:
        ValueError: As in `aggregate`.

    >>> aggregate_rows(torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 0, 0]]), reduction="token_mean").totals
    tensor([3., 1.])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_same_shape(values=values, mask=mask)
    mask = mask.bool()
    sums = values.masked_fill(~mask, 0).sum(dim=-1)
    counts = mask.sum(dim=-1)
    dtype = torch.promote_types(values.dtype, torch.float32)  # half precision cannot count beyond a few hundred
    if reduction == "token_mean":
        return RowSums(sums, counts.to(dtype))
    if reduction == "prompt_mean" and prompt_tokens is not None:
        shares = torch.where(counts > 0, 1 / prompt_tokens.to(dtype).clamp(min=1), 0.0)
        return RowSums(sums * shares, counts * shares)
    if reduction == "prompt_mean":
        rows = check_positive("group_size (needed by reduction='prompt_mean')", group_size or 0)
        if len(sums) % int(rows):
            raise ValueError(f"group_size must divide the batch of {len(sums)} rows, got {group_size}")
        sums, counts = sums.view(-1, int(rows)).sum(dim=1), counts.view(-1, int(rows)).sum(dim=1)
    weights = (counts > 0).to(dtype)
    if reduction in ("sequence_mean_token_mean", "prompt_mean"):
        return RowSums(sums / counts.clamp(min=1), weights)
    if reduction == "sequence_mean_token_sum_norm":
        length = check_positive("max_length (needed by reduction='sequence_mean_token_sum_norm')", max_length or 0)
        return RowSums(sums / length, weights)
    return RowSums(sums, weights)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row over its mask, 0 for rows without a token.

    Args:
        values: `[batch, time]`; its content outside the mask has no influence.
        mask: `[batch, time]`, bool or 0/1.

    Returns:
        `[batch]`.

    >>> masked_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]]))
    tensor([2.])
    """
    mask = mask.bool()
    return torch.where(mask, values, 0).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
