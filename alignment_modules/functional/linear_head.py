"""The autograd function behind `linear_token_log_probs`: a linear head and a log-softmax in the fewest passes.

Only one `[rows, vocabulary]` buffer exists. The forward pass fills it with logits and reduces them block by block; the
backward pass overwrites it, block by block, with the gradient that the two matrix products need.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignment_modules.functional.head_chunks import (
    accumulate_product,
    blocks,
    cap_slope,
    capped,
    chunk_rows,
    in_autocast,
    project,
    reduction_dtype,
    spans,
)
from alignment_modules.functional.support import Support


class LinearTokenScores(NamedTuple):
    """What `linear_token_scores` knows of each row; None for what was not asked for.

    Attributes:
        token_logps: `[n]` float32 (float64 for float64 inputs), log-probability of the target in nats.
        entropy: `[n]` same dtype, entropy of the same distribution in nats, differentiable.
        correct: `[n]` bool, whether the target is the most probable token.
        normalizer: `[n]` same dtype as `token_logps`, logsumexp of the logits, differentiable.
        mean_logp: `[n]` same dtype, mean log-probability over the vocabulary, differentiable.
        collision: `[n]` same dtype, `log sum p^2` of the same distribution, without gradient.
        full_logps: `[n]` same dtype, log-probability of the target over the whole vocabulary, differentiable.
    """

    token_logps: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    normalizer: Tensor | None
    mean_logp: Tensor | None
    collision: Tensor | None
    full_logps: Tensor | None


class HeadSettings(NamedTuple):
    """How logits come from the matrix product, and what to compute of them."""

    alpha: float  # multiplies the product, inside the matrix multiplication
    cap: float | None  # logits = cap * tanh(product), None without soft-capping
    max_chunk_bytes: int
    with_entropy: bool
    with_correct: bool
    with_normalizer: bool
    with_mean_logp: bool
    with_collision: bool
    with_full_logps: bool = False  # only where there is a support
    needs_grad: bool = False


def apply_linear_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    settings: HeadSettings,
    support: Support | None = None,
) -> LinearTokenScores:
    """Score each row's target, in autocast's dtype where autocast is on.

    Args:
        hidden: `[n, d]`.
        weight: `[vocabulary, d]`.
        bias: `[vocabulary]` or None.
        targets: `[n]` int64.
        settings: What to compute, and how.
        support: `[n]` on the device of `hidden`, the tokens that each distribution is over; None: all.
    """
    hidden, weight, bias = in_autocast(hidden, weight, bias)
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    with torch.autocast(hidden.device.type, enabled=False):
        outputs = _LinearHead.apply(hidden, weight, bias, targets, settings._replace(needs_grad=needs_grad), support)
    return LinearTokenScores(*outputs)


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: HeadSettings,
        support: Support | None,
    ) -> tuple[Tensor | None, ...]:
        rows = hidden.shape[0]
        token_logps = torch.empty(rows, dtype=reduction_dtype(hidden.dtype), device=hidden.device)
        normalizer = torch.empty_like(token_logps)
        entropy = torch.empty_like(token_logps) if settings.with_entropy else None
        correct = torch.empty_like(token_logps, dtype=torch.bool) if settings.with_correct else None
        mean_logp = torch.empty_like(token_logps) if settings.with_mean_logp else None
        collision = torch.empty_like(token_logps) if settings.with_collision else None
        full_logps = torch.empty_like(token_logps) if settings.with_full_logps else None
        full_normalizer = torch.empty_like(token_logps) if settings.with_full_logps else None
        chunk = _chunk_rows(hidden, weight, settings)
        buffer = hidden.new_empty(min(chunk, rows), weight.shape[0])
        for span in spans(rows, chunk):
            product = project(hidden[span], weight, bias, settings.alpha, buffer)
            for block, part in blocks(product, span):
                logits = capped(product[block], settings.cap)
                index = targets[part, None]
                if full_logps is not None and full_normalizer is not None:
                    # As without a support, to the last bit: equal models are then compared with a difference of 0.
                    full_logps[part] = torch.log_softmax(logits, dim=-1).gather(1, index)[:, 0]
                    full_normalizer[part] = logits.gather(1, index)[:, 0] - full_logps[part]
                excluded = None if support is None else support.excluded(part, weight.shape[0])
                if excluded is not None:
                    logits = logits.masked_fill(excluded, -torch.inf)
                log_p = torch.log_softmax(logits, dim=-1)
                token_logps[part] = log_p.gather(1, index)[:, 0]
                normalizer[part] = logits.gather(1, index)[:, 0] - token_logps[part]
                if mean_logp is not None:
                    mean_logp[part] = log_p.mean(dim=-1)
                if collision is not None:
                    collision[part] = log_p.mul(2).logsumexp(dim=-1)
                if correct is not None:
                    correct[part] = logits.argmax(dim=-1) == targets[part]
                if entropy is not None:
                    if excluded is not None:
                        log_p.masked_fill_(excluded, 0.0)  # 0 * -inf is NaN; 1 * 0 adds nothing
                    entropy[part] = log_p.exp().mul_(log_p).sum(dim=-1).neg_()
        ctx.settings, ctx.support, ctx.chunk = settings, support, chunk
        ctx.product = buffer if settings.needs_grad and chunk >= rows else None
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy, full_normalizer)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(found for found in (correct, collision) if found is not None))
        shown = normalizer.clone() if settings.with_normalizer else None
        return token_logps, entropy, correct, shown, mean_logp, collision, full_logps

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_logps: Tensor | None,
        grad_entropy: Tensor | None,
        _: Tensor | None,
        grad_normalizer: Tensor | None,
        grad_mean: Tensor | None,
        __: Tensor | None,
        grad_full: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *found = ctx.saved_tensors
        found = _Found(*found)
        normalizer, support = found.normalizer, ctx.support
        alpha, cap = ctx.settings.alpha, ctx.settings.cap
        # The kept product is overwritten below, so a second backward through the same graph computes it again.
        product, ctx.product = ctx.product, None
        target = torch.zeros_like(normalizer) if grad_logps is None else grad_logps
        softmax = -target
        if grad_normalizer is not None:
            softmax = softmax + grad_normalizer
        if grad_mean is not None:
            softmax = softmax - grad_mean
        uniform = None if grad_mean is None else grad_mean / weight.shape[0]
        if grad_full is not None:
            target = target + grad_full
        upstream = _Upstream(target, softmax, uniform, grad_entropy, grad_full)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows_of_chunks = list(spans(hidden.shape[0], ctx.chunk))
        dtype = hidden.dtype if len(rows_of_chunks) == 1 else normalizer.dtype
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_weight else None
        grad_bias = normalizer.new_zeros(weight.shape[0]) if needs_bias else None
        buffer = hidden.new_empty(min(ctx.chunk, hidden.shape[0]), weight.shape[0]) if product is None else product
        temporaries = hidden.dtype != normalizer.dtype or cap is not None or grad_entropy is not None
        temporaries = temporaries or support is not None
        with torch.autocast(hidden.device.type, enabled=False):
            for span in rows_of_chunks:
                gradient = product if product is not None else project(hidden[span], weight, bias, alpha, buffer)
                for block, part in blocks(gradient, span, temporaries=temporaries):
                    excluded = None if support is None else support.excluded(part, weight.shape[0])
                    rows = _columns(found, part), _columns(upstream, part)
                    _overwrite_with_gradient(gradient[block], cap, *rows, excluded)
                if grad_hidden is not None:
                    grad_hidden[span].addmm_(gradient, weight, beta=0, alpha=alpha)
                if grad_weight is not None:
                    accumulate_product(grad_weight, gradient.t(), hidden[span], alpha, first=span.start == 0)
                if grad_bias is not None:
                    grad_bias.add_(gradient.sum(dim=0, dtype=grad_bias.dtype), alpha=alpha)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


class _Found(NamedTuple):
    """What the forward pass knows of each row."""

    targets: Tensor
    normalizer: Tensor
    entropy: Tensor | None
    full_normalizer: Tensor | None


class _Upstream(NamedTuple):
    """Incoming gradients of each row, by what they multiply in the gradient of the logits."""

    target: Tensor  # one-hot of the target
    softmax: Tensor  # the probabilities
    uniform: Tensor | None  # every entry alike
    entropy: Tensor | None  # -p (log p + entropy)
    full: Tensor | None  # the probabilities over the whole vocabulary, negative


_Rows = TypeVar("_Rows", _Found, _Upstream)


def _columns(rows: _Rows, part: slice) -> _Rows:
    """Some rows, each value as a column `[rows, 1]`."""
    columns: list[Any] = [None if values is None else values[part, None] for values in rows]
    return type(rows)(*columns)


def _overwrite_with_gradient(
    product: Tensor, cap: float | None, found: _Found, upstream: _Upstream, excluded: Tensor | None
) -> None:
    """Overwrite `product` with the gradient with respect to it.

    Args:
        product: `[rows, vocabulary]`.
        cap: Of the logits.
        found: Columns.
        upstream: Columns.
        excluded: `[rows, vocabulary]` bool, the tokens that the distribution is not over; None: none.
    """
    logits = capped(product, cap)
    slope = cap_slope(logits, cap)
    whole = None
    if upstream.full is not None and found.full_normalizer is not None:
        whole = (logits - found.full_normalizer).exp_().mul_(upstream.full)
    log_p = logits.sub_(found.normalizer)
    if upstream.entropy is None or found.entropy is None:
        gradient = log_p.exp_().mul_(upstream.softmax)
    else:
        factor = (log_p + found.entropy).mul_(-upstream.entropy).add_(upstream.softmax)
        gradient = log_p.exp_().mul_(factor)
    if excluded is not None:
        gradient.masked_fill_(excluded, 0.0)
    if whole is not None:
        gradient.sub_(whole)
    if upstream.uniform is not None:
        gradient.add_(upstream.uniform)
    gradient.scatter_add_(1, found.targets, upstream.target)
    if slope is not None:
        gradient.mul_(slope)
    if gradient.data_ptr() != product.data_ptr():
        product.copy_(gradient)


def _chunk_rows(hidden: Tensor, weight: Tensor, settings: HeadSettings) -> int:
    row_bytes = weight.shape[0] * hidden.element_size()
    return chunk_rows(row_bytes, settings.max_chunk_bytes, hidden.device.type, kept=settings.needs_grad)
