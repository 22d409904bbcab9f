"""Weights of tokens in the loss (`loss_weights` of a batch): what they may be, and the sum and normaliser they give."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alignment_modules.functional.logprobs import IGNORED_TARGET
from alignment_modules.policies.masks import check_shape
from alignment_modules.policies.segments import Segments

LOSS_WEIGHTS = "loss_weights"


def label_segments(batch: Mapping[str, Any]) -> Segments:
    """The segments of a batch of `input_ids` and `labels`, with what else of `Segments.from_labels` it holds.

    A supervised token of weight 0 is not supervised. Weights of other tokens have no meaning and may be anything.

    Args:
        batch: Tensors `[batch, time]`.

    Raises:
        ValueError: If a supervised token's weight is negative or not finite (in float32), or `loss_weights` has another
            shape than `input_ids`.
    """
    labels, weights = batch["labels"], batch.get(LOSS_WEIGHTS)
    if weights is not None:
        weights = check_shape(LOSS_WEIGHTS, weights, batch["input_ids"]).to(labels.device, torch.float32)
        labels = labels.where(weights != 0, IGNORED_TARGET)
    segments = Segments.from_labels(batch["input_ids"], labels, batch.get("attention_mask"), batch.get("position_ids"))
    if weights is not None:
        flat = weights.flatten()
        wrong = segments.slot[~((flat[segments.slot] > 0) & flat[segments.slot].isfinite())]
        if len(wrong):
            row, column = divmod(int(wrong[0]), weights.shape[1])
            raise ValueError(
                f"{LOSS_WEIGHTS} is {float(weights[row, column]):g} at row {row}, column {column} of a batch; a weight "
                "must be a finite number of at least 0"
            )
    return segments


def weigh(values: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    """Each token's value times its weight.

    Args:
        values: `[batch, time]`, finite.
        mask: `[batch, time]` bool, true where a token is supervised.
        weights: `[batch, time]`; None: all weigh 1, and the values are given back as they are.

    Returns:
        `[batch, time]`; with weights 0 off the mask.
    """
    return values if weights is None else values * weights.float().masked_fill(~mask, 0)


def row_weights(mask: Tensor, weights: Tensor | None) -> Tensor:
    """What a row adds to the number that a weighted sum is divided by: the weights of its supervised tokens.

    Args:
        mask: `[batch, time]` bool, true where a token is supervised.
        weights: `[batch, time]`; None: all weigh 1.

    Returns:
        `[batch]`, float32 (int64 where all weigh 1).
    """
    return (mask if weights is None else weights.float().masked_fill(~mask, 0)).sum(dim=-1)
