"""From logits to tokens: temperature, truncation of the support, and inverse-CDF sampling."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 128  # tokens per block of the two-level search
_FIRST = 256  # likeliest tokens among which a nucleus is looked for first


def token_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Full-vocabulary probabilities under a temperature.

    Args:
        logits: `[rows, vocabulary]`, any float type.
        temperature: Divides the logits; > 0.

    Returns:
        `[rows, vocabulary]` float32, or float64 for float64 logits.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    return torch.softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def truncate_support(probabilities: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Zeroes the tokens that the filters exclude; what is left is not renormalised.

    The filters apply in the order top-k, top-p (on the mass that top-k left), min-p. The likeliest token always stays.
    Ties are kept in order of token id.

    Args:
        probabilities: `[rows, vocabulary]`.
        top_k: Number of likeliest tokens kept; 0 keeps all.
        top_p: Smallest set of likeliest tokens whose mass reaches `top_p` of what top-k left (Holtzman et al. 2020).
        min_p: Tokens at least `min_p` times as likely as the likeliest (Nguyen et al. 2024).

    Returns:
        `[rows, vocabulary]` with zeros outside the support.

    >>> truncate_support(torch.tensor([[0.5, 0.25, 0.125, 0.125]]), top_p=0.7)
    tensor([[0.5000, 0.2500, 0.0000, 0.0000]])
    """
    vocabulary = probabilities.shape[-1]
    kept = probabilities
    if 0 < top_k < vocabulary:
        values = probabilities.topk(top_k, dim=-1).values
        number = _in_nucleus(values, top_p, values.sum(-1, keepdim=True))
        kept = _likeliest(probabilities, values.gather(1, number - 1), number)
    elif top_p < 1.0:
        kept = _likeliest(probabilities, *_nucleus(probabilities, top_p))
    if min_p > 0.0:
        kept = kept.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0)
    return kept


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The least probability in each row's nucleus and the number of its tokens, `[rows, 1]` both.

    Sorting a large vocabulary takes a CPU longer than the rest of a step, and most nuclei are small: they are looked
    for among the likeliest few, and those of the rows that are left among more.
    """
    vocabulary, total = probabilities.shape[-1], probabilities.sum(-1, keepdim=True)
    least, number = torch.empty_like(total), torch.empty_like(total, dtype=torch.int64)
    rows, width = torch.arange(len(total), device=total.device), _FIRST
    while len(rows):
        part = probabilities if len(rows) == len(total) else probabilities[rows]
        some = probabilities.is_cpu and 2 * width < vocabulary
        values = part.topk(width, dim=-1).values if some else part.sort(dim=-1, descending=True).values
        number[rows] = _in_nucleus(values, top_p, total[rows])
        least[rows] = values.gather(1, number[rows] - 1)
        if not some:
            break
        rows, width = rows[values.sum(-1) < top_p * total[rows, 0]], 16 * width
    return least, number


def _in_nucleus(values: Tensor, top_p: float, total: Tensor) -> Tensor:
    """How many of the likeliest are in the nucleus, at least one: `[rows, 1]` of `values` `[rows, n]`, descending."""
    if top_p == 1.0:
        return torch.full_like(total, values.shape[-1], dtype=torch.int64)
    above = values.cumsum(-1) - values  # mass of the likelier tokens
    return (above < top_p * total).sum(-1, keepdim=True).clamp_(min=1)


def _likeliest(probabilities: Tensor, least: Tensor, number: Tensor) -> Tensor:
    """Zeroes all but the `number` likeliest tokens of each row, the last of which has the probability `least`."""
    kept = probabilities >= least
    surplus = kept.sum(-1, keepdim=True) - number
    if not probabilities.is_cpu or bool(surplus.any()):
        equal = probabilities == least
        kept &= ~equal | (equal.cumsum(-1) <= equal.sum(-1, keepdim=True) - surplus)
    return torch.where(kept, probabilities, 0.0)


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Picks the first token whose cumulative weight exceeds `uniform * total`.

    Large vocabularies are searched in two levels (blocks, then within a block), so that the sequential cumulative sum
    never runs over all of it. A token of zero weight is never picked.

    Args:
        weights: `[rows, vocabulary]`, not negative, not necessarily normalised.
        uniforms: `[rows]` in [0, 1).

    Returns:
        `[rows]` int64 token ids.

    >>> inverse_cdf(torch.tensor([[0.2, 0.0, 0.8], [0.2, 0.0, 0.8]]), torch.tensor([0.1, 0.2]))
    tensor([0, 2])
    """
    rows, vocabulary = weights.shape
    if vocabulary < 8 * _BLOCK:
        return _search(weights, uniforms)
    blocks = vocabulary // _BLOCK
    body, tail = weights[:, : blocks * _BLOCK].view(rows, blocks, _BLOCK), weights[:, blocks * _BLOCK :]
    sums = body.sum(-1)
    if tail.shape[1]:
        sums = torch.cat((sums, tail.sum(-1, keepdim=True)), dim=1)
    cumulative = _cumulative(sums)
    target = _target(cumulative, uniforms)
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=sums.shape[1] - 1)
    residual = target - torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp_(max=vocabulary - 1))
    if tail.shape[1]:
        # The last block is short: what was read beyond its end is a repeat of the last token.
        repeat = (block * _BLOCK + torch.arange(_BLOCK, device=weights.device)) >= vocabulary
        inside = inside.masked_fill(repeat, 0)
    within = _cumulative(inside)
    # Rounding may carry the residual to the block's end; keep it inside, where a weight is.
    residual = torch.minimum(residual, _below(within[:, -1:]))
    offset = torch.searchsorted(within, residual, right=True)
    return (block * _BLOCK + offset).squeeze(1).clamp_(max=vocabulary - 1)


def _search(weights: Tensor, uniforms: Tensor) -> Tensor:
    cumulative = _cumulative(weights)
    found = torch.searchsorted(cumulative, _target(cumulative, uniforms), right=True)
    return found.squeeze(1).clamp_(max=weights.shape[1] - 1)


def _cumulative(weights: Tensor) -> Tensor:
    return weights.cumsum(-1, dtype=torch.float32 if weights.device.type == "mps" else torch.float64)


def _target(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    total = cumulative[:, -1:]
    return torch.minimum(uniforms.to(cumulative.dtype)[:, None] * total, _below(total))


def _below(values: Tensor) -> Tensor:
    """The largest number under each value."""
    return torch.nextafter(values, torch.zeros_like(values))
