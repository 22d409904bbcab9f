"""Losses of reward models, unreduced."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from alignment_modules.functional.checks import check_same_shape
from alignment_modules.functional.ranges import NonNegative, check_options


def reward_pair_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, margins: Tensor | None = None, center_coef: NonNegative = 0.0
) -> Tensor:
    """Bradley-Terry loss of a reward model on pairs: `-log s(r_w - r_l - margin) + center_coef (r_w + r_l)^2`.

    Args:
        chosen_scores: `[batch]`, the scores `r_w` of the chosen completions.
        rejected_scores: `[batch]`, the scores `r_l` of the rejected ones.
        margins: `[batch]`, by how much the chosen one should win (Llama 2, arXiv:2307.09288); None: by anything.
        center_coef: Pull of the scores' mean to 0 (arXiv:2312.09244 uses 0.01): differences alone do not fix it.

    Returns:
        `[batch]`.

    Raises:
        ValueError: If shapes differ or `center_coef` is negative.

    >>> import torch
    >>> reward_pair_loss(torch.tensor([1.0]), torch.tensor([1.0]), center_coef=0.01)
    tensor([0.7331])
    """
    check_options(reward_pair_loss, locals())
    check_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    difference = chosen_scores - rejected_scores
    if margins is not None:
        check_same_shape(chosen_scores=chosen_scores, margins=margins)
        difference = difference - margins.detach()
    losses = -F.logsigmoid(difference)
    return losses + center_coef * (chosen_scores + rejected_scores).square() if center_coef else losses
