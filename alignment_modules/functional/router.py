"""Load balancing of a mixture of experts, in a form that can be added up over micro-batches and ranks.

The loss of Switch Transformers (arXiv:2101.03961, equations 4 to 6), with several experts a token as transformers has
it, is `experts * sum_e f_e * P_e`: `f_e` is the share of tokens that are sent to expert `e`, `P_e` the mean probability
that the router gives it, both over the tokens of all layers. A product of two means is no mean of anything. But `f` has
no gradient, so it may be counted first over as many tokens as one likes; the loss is then a mean over tokens.
"""

import torch
from torch import Tensor

from alignment_modules.functional.head_chunks import upcast


def expert_counts(router_logits: Tensor, top_k: int) -> Tensor:
    """How many tokens are sent to each expert.

    Args:
        router_logits: `[..., experts]`, before the softmax.
        top_k: Experts of a token, those of the largest logits; from 1 to the number of experts.

    Returns:
        `[experts]` float32 without gradient, in sum `top_k` times the number of tokens. Counts of several layers,
        micro-batches and ranks add up.

    Raises:
        ValueError: If `top_k` is out of range.
    """
    experts = router_logits.shape[-1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k} must be from 1 to the number of experts, {experts}")
    chosen = router_logits.detach().topk(top_k, dim=-1).indices
    sent = torch.zeros_like(router_logits, dtype=torch.float32, requires_grad=False).scatter_(-1, chosen, 1.0)
    return sent.flatten(0, -2).sum(0)


def router_shares(counts: Tensor, top_k: int) -> Tensor:
    """The share of tokens that each expert gets, `f` of the loss.

    Args:
        counts: `[experts]`, by `expert_counts`, over all tokens that share a mean.
        top_k: Experts of a token.

    Returns:
        `[experts]`, in sum `top_k`; all 0 where nothing was counted.

    Example:
        >>> router_shares(torch.tensor([3.0, 1.0]), top_k=1)
        tensor([0.7500, 0.2500])
    """
    return counts * top_k / counts.sum().clamp(min=1)


def load_balancing_loss(router_logits: Tensor, shares: Tensor) -> Tensor:
    """The load-balancing loss of each token, linear in the router's probabilities.

    Args:
        router_logits: `[..., experts]`, before the softmax.
        shares: `[experts]`, by `router_shares`; taken as constants.

    Returns:
        `[...]` `experts * sum_e shares_e * p_e` in float32 (float64 for float64 logits). Its mean over the tokens that
        were counted is the loss of Switch Transformers: `top_k` where the router is indifferent, `experts` where each
        token's probability and the only assignment go to one and the same expert.

    Raises:
        ValueError: If there is not one share an expert.
    """
    experts = router_logits.shape[-1]
    if shares.shape != (experts,):
        raise ValueError(f"shares has shape {tuple(shares.shape)}; expected ({experts},), one for each expert")
    probabilities = upcast(router_logits).softmax(-1)
    return experts * (probabilities * shares.detach().to(probabilities)).sum(-1)
