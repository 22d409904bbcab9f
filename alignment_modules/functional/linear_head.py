"""The autograd function behind `linear_token_log_probs`: a linear head and a log-softmax in the fewest passes.

Only one `[rows, vocabulary]` buffer exists. The forward pass fills it with logits and reduces them block by block; the
backward pass overwrites it, block by block, with the gradient that the two matrix products need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


class LinearTokenScores(NamedTuple):
    """What `linear_token_scores` knows of each row; None for what was not asked for.

    Attributes:
        token_logps: `[n]` float32 (float64 for float64 inputs), log-probability of the target in nats.
        entropy: `[n]` same dtype, entropy of the whole distribution in nats, differentiable.
        correct: `[n]` bool, whether the target is the most probable token.
        normalizer: `[n]` same dtype as `token_logps`, logsumexp of the logits, differentiable.
        mean_logp: `[n]` same dtype, mean log-probability over the vocabulary, differentiable.
        collision: `[n]` same dtype, `log sum p^2` over the vocabulary, without gradient.
    """

    token_logps: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    normalizer: Tensor | None
    mean_logp: Tensor | None
    collision: Tensor | None


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
    needs_grad: bool = False


def apply_linear_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: HeadSettings
) -> LinearTokenScores:
    """Score each row's target, in autocast's dtype where autocast is on.

    Args:
        hidden: `[n, d]`.
        weight: `[vocabulary, d]`.
        bias: `[vocabulary]` or None.
        targets: `[n]` int64.
        settings: What to compute, and how.
    """
    hidden, weight, bias = in_autocast(hidden, weight, bias)
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    with torch.autocast(hidden.device.type, enabled=False):
        outputs = _LinearHead.apply(hidden, weight, bias, targets, settings._replace(needs_grad=needs_grad))
    return LinearTokenScores(*outputs)


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: HeadSettings
    ) -> tuple[Tensor | None, ...]:
        rows = hidden.shape[0]
        token_logps = torch.empty(rows, dtype=reduction_dtype(hidden.dtype), device=hidden.device)
        normalizer = torch.empty_like(token_logps)
        entropy = torch.empty_like(token_logps) if settings.with_entropy else None
        correct = torch.empty_like(token_logps, dtype=torch.bool) if settings.with_correct else None
        mean_logp = torch.empty_like(token_logps) if settings.with_mean_logp else None
        collision = torch.empty_like(token_logps) if settings.with_collision else None
        chunk = _chunk_rows(hidden, weight, settings)
        buffer = hidden.new_empty(min(chunk, rows), weight.shape[0])
        for span in spans(rows, chunk):
            product = project(hidden[span], weight, bias, settings.alpha, buffer)
            for block, part in blocks(product, span):
                logits = capped(product[block], settings.cap)
                index = targets[part, None]
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
                    entropy[part] = log_p.exp().mul_(log_p).sum(dim=-1).neg_()
        ctx.settings = settings
        ctx.chunk = chunk
        ctx.product = buffer if settings.needs_grad and chunk >= rows else None
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(found for found in (correct, collision) if found is not None))
        shown = normalizer.clone() if settings.with_normalizer else None
        return token_logps, entropy, correct, shown, mean_logp, collision

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
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
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
        upstream = _Upstream(target, softmax, uniform, grad_entropy)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows_of_chunks = list(spans(hidden.shape[0], ctx.chunk))
        dtype = hidden.dtype if len(rows_of_chunks) == 1 else normalizer.dtype
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_weight else None
        grad_bias = normalizer.new_zeros(weight.shape[0]) if needs_bias else None
        buffer = hidden.new_empty(min(ctx.chunk, hidden.shape[0]), weight.shape[0]) if product is None else product
        temporaries = hidden.dtype != normalizer.dtype or cap is not None or grad_entropy is not None
        with torch.autocast(hidden.device.type, enabled=False):
            for span in rows_of_chunks:
                gradient = product if product is not None else project(hidden[span], weight, bias, alpha, buffer)
                for block, part in blocks(gradient, span, temporaries=temporaries):
                    _overwrite_with_gradient(
                        gradient[block],
                        cap,
                        targets[part, None],
                        normalizer[part, None],
                        None if entropy is None else entropy[part, None],
                        upstream.columns(part),
                    )
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
        )


class _Upstream(NamedTuple):
    """Incoming gradients of each row, by what they multiply in the gradient of the logits."""

    target: Tensor  # one-hot of the target
    softmax: Tensor  # the probabilities
    uniform: Tensor | None  # every entry alike
    entropy: Tensor | None  # -p (log p + entropy)

    def columns(self, part: slice) -> _Upstream:
        uniform = None if self.uniform is None else self.uniform[part, None]
        entropy = None if self.entropy is None else self.entropy[part, None]
        return _Upstream(self.target[part, None], self.softmax[part, None], uniform, entropy)


def _overwrite_with_gradient(
    product: Tensor,
    cap: float | None,
    index: Tensor,
    normalizer: Tensor,
    entropy: Tensor | None,
    upstream: _Upstream,
) -> None:
    """Overwrite `product` with the gradient with respect to it; all but `product` are columns `[rows, 1]`."""
    logits = capped(product, cap)
    slope = cap_slope(logits, cap)
    log_p = logits.sub_(normalizer)
    if upstream.entropy is None or entropy is None:
        gradient = log_p.exp_().mul_(upstream.softmax)
    else:
        factor = (log_p + entropy).mul_(-upstream.entropy).add_(upstream.softmax)
        gradient = log_p.exp_().mul_(factor)
    if upstream.uniform is not None:
        gradient.add_(upstream.uniform)
    gradient.scatter_add_(1, index, upstream.target)
    if slope is not None:
        gradient.mul_(slope)
    if gradient.data_ptr() != product.data_ptr():
        product.copy_(gradient)


def _chunk_rows(hidden: Tensor, weight: Tensor, settings: HeadSettings) -> int:
    row_bytes = weight.shape[0] * hidden.element_size()
    return chunk_rows(row_bytes, settings.max_chunk_bytes, hidden.device.type, kept=settings.needs_grad)
