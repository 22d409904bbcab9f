"""Log-probabilities and entropies of target tokens.

Everything here reduces in float32 (float64 inputs stay float64) whatever the dtype of the logits, because a
log-softmax over a large vocabulary loses its digits in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_TARGET = -100


class LinearTokenScores(NamedTuple):
    """What `linear_token_scores` knows of each row.

    Attributes:
        token_logps: `[n]` float32 (float64 for float64 inputs), log-probability of the target in nats.
        entropy: `[n]` same dtype, entropy of the whole distribution in nats, differentiable; None if not asked for.
        correct: `[n]` bool, whether the target is the most probable token; None if not asked for.
    """

    token_logps: Tensor
    entropy: Tensor | None
    correct: Tensor | None


def token_log_probs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target token, `log_softmax(logits / temperature)[target]`.

    `logits[..., t, :]` must be the distribution of `targets[..., t]`: shift before you call.

    Args:
        logits: `[batch, time, vocabulary]` (any leading shape), any floating dtype.
        targets: `[batch, time]` int64. Where a target is -100 the result is 0 and has no gradient.
        temperature: Divides the logits, > 0. Use the temperature that the tokens were sampled with.

    Returns:
        `[batch, time]` in nats, float32, or float64 for float64 logits.

    Raises:
        ValueError: If the shapes do not fit or `temperature` is not positive.

    >>> token_log_probs(torch.zeros(1, 2, 4), torch.tensor([[3, 0]]))
    tensor([[-1.3863, -1.3863]])
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have the shape of logits without its last dimension, {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    scaled = _upcast(logits)
    if _positive("temperature", temperature) != 1.0:
        scaled = scaled / temperature
    width = logits.shape[-1]
    losses = F.cross_entropy(
        scaled.reshape(-1, width), targets.reshape(-1), reduction="none", ignore_index=IGNORED_TARGET
    )
    return -losses.reshape(targets.shape)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of each position's distribution, `-sum p log p` with `p = softmax(logits / temperature)`.

    Args:
        logits: `[batch, time, vocabulary]` (any leading shape); entries of -inf count as probability 0.
        temperature: Divides the logits, > 0.

    Returns:
        `[batch, time]` in nats, float32, or float64 for float64 logits.

    Raises:
        ValueError: If `temperature` is not positive.

    >>> token_entropy(torch.tensor([0.0, 0.0, float("-inf")]))
    tensor(0.6931)
    """
    log_p = F.log_softmax(_upcast(logits) / _positive("temperature", temperature), dim=-1)
    # A finite floor, because 0 * -inf is NaN both in the value and in the gradient.
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(dim=-1)


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int = 256 * 2**20,
) -> Tensor:
    """Log-probability of each target under a linear head, without a log-softmax copy of the logits.

    The logits are `x = logit_scale * (hidden @ weight.T + bias)`, then `softcap * tanh(x / softcap)` if `softcap` is
    given, then divided by `temperature`. Their buffer is kept once and overwritten by its own gradient in the
    backward pass. If it would exceed `max_chunk_bytes`, the rows are done in chunks, nothing is kept, and the backward
    pass computes each chunk's logits again. Under autocast the product runs in autocast's dtype, as `nn.Linear` would.

    Args:
        hidden: `[n, d]`, hidden states of the positions that predict the targets.
        weight: `[vocabulary, d]`, the head's weight, in the dtype of `hidden`.
        targets: `[n]` int64, each in `[0, vocabulary)`.
        bias: `[vocabulary]` or None.
        temperature: Divides the final logits, > 0.
        logit_scale: Multiplies the head's output (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: Gemma 2's `final_logit_softcapping`, > 0, or None.
        max_chunk_bytes: Largest buffer of logits in bytes.

    Returns:
        `[n]` in nats, float32, or float64 for float64 inputs. Gradients flow to `hidden`, `weight` and `bias`, once
        differentiable.

    Raises:
        ValueError: If shapes do not fit, or `temperature`, `softcap` or `max_chunk_bytes` is not positive.

    >>> linear_token_log_probs(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])
    """
    return linear_token_scores(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        max_chunk_bytes=max_chunk_bytes,
    ).token_logps


def linear_token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int = 256 * 2**20,
    with_entropy: bool = False,
    with_correct: bool = False,
) -> LinearTokenScores:
    """`linear_token_log_probs` and, from the same pass over the logits, what else is asked for.

    Args:
        hidden: As in `linear_token_log_probs`, and so are the others that are not named here.
        weight: `[vocabulary, d]`.
        targets: `[n]` int64.
        bias: `[vocabulary]` or None.
        temperature: Divides the final logits, > 0.
        logit_scale: Multiplies the head's output.
        softcap: Bound of the soft-capped logits, > 0, or None.
        max_chunk_bytes: Largest buffer of logits in bytes.
        with_entropy: Also compute the entropy. It is differentiable; unused, its gradient costs nothing.
        with_correct: Also compute whether the target is the most probable token.

    Returns:
        `LinearTokenScores` with None for what was not asked for.

    Raises:
        ValueError: If shapes do not fit, or `temperature`, `softcap` or `max_chunk_bytes` is not positive.

    >>> scores = linear_token_scores(torch.eye(2), 9 * torch.eye(2), torch.tensor([0, 0]), with_correct=True)
    >>> scores.correct
    tensor([ True, False])
    """
    _check_head(hidden, weight, targets, bias)
    _positive("temperature", temperature)
    _positive("max_chunk_bytes", max_chunk_bytes)
    if softcap is None:
        alpha, cap = logit_scale / temperature, None
    else:
        alpha, cap = logit_scale / _positive("softcap", softcap), softcap / temperature
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    settings = _Settings(alpha, cap, max_chunk_bytes, needs_grad, with_entropy, with_correct)
    with torch.autocast(device_type, enabled=False):
        return LinearTokenScores(*_LinearTokenLogProbs.apply(hidden, weight, bias, targets, settings))


class _Settings(NamedTuple):
    alpha: float  # multiplies the product inside the matrix multiplication
    cap: float | None  # logits = cap * tanh(product), None without soft-capping
    max_chunk_bytes: int
    needs_grad: bool
    with_entropy: bool
    with_correct: bool


class _LinearTokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows = hidden.shape[0]
        dtype = _reduction_dtype(hidden.dtype)
        token_logps, normaliser = (torch.empty(rows, dtype=dtype, device=hidden.device) for _ in range(2))
        entropy = torch.empty_like(token_logps) if settings.with_entropy else None
        correct = torch.empty_like(token_logps, dtype=torch.bool) if settings.with_correct else None
        chunk = _chunk_rows(hidden, weight, settings)
        keep = settings.needs_grad and chunk >= rows
        buffer = hidden.new_empty(min(chunk, rows), weight.shape[0])
        for span in _spans(rows, chunk):
            product = _project(hidden[span], weight, bias, settings.alpha, buffer)
            for block in _spans(product.shape[0], _block_rows(product)):
                part = slice(span.start + block.start, span.start + block.stop)
                logits = _logits(product[block], settings.cap)
                index = targets[part, None]
                log_p = torch.log_softmax(logits, dim=-1)
                token_logps[part] = log_p.gather(1, index)[:, 0]
                normaliser[part] = logits.gather(1, index)[:, 0] - token_logps[part]
                if correct is not None:
                    correct[part] = logits.argmax(dim=-1) == targets[part]
                if entropy is not None:
                    entropy[part] = log_p.exp().mul_(log_p).sum(dim=-1).neg_()
        ctx.settings = settings
        ctx.product = buffer if keep else None
        ctx.chunk = chunk
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy)
        ctx.set_materialize_grads(False)
        if correct is not None:
            ctx.mark_non_differentiable(correct)
        return token_logps, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        alpha, cap = ctx.settings.alpha, ctx.settings.cap
        # The kept product is overwritten below, so a second backward through the same graph computes it again.
        product, ctx.product = ctx.product, None
        if grad_logps is None and grad_entropy is None:
            return None, None, None, None, None
        if grad_logps is None:
            grad_logps = torch.zeros_like(normaliser)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        spans = list(_spans(hidden.shape[0], ctx.chunk))
        dtype = hidden.dtype if len(spans) == 1 else normaliser.dtype
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_weight else None
        grad_bias = normaliser.new_zeros(weight.shape[0]) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            buffer = None
            for span in spans:
                if product is None:
                    if buffer is None:
                        buffer = hidden.new_empty(span.stop - span.start, weight.shape[0])
                    gradient = _project(hidden[span], weight, bias, alpha, buffer)
                else:
                    gradient = product
                for block in _spans(gradient.shape[0], _block_rows(gradient)):
                    part = slice(span.start + block.start, span.start + block.stop)
                    _overwrite_with_gradient(
                        gradient[block],
                        cap,
                        targets[part, None],
                        normaliser[part, None],
                        grad_logps[part, None],
                        None if grad_entropy is None else (entropy[part, None], grad_entropy[part, None]),
                    )
                if grad_hidden is not None:
                    grad_hidden[span].addmm_(gradient, weight, beta=0, alpha=alpha)
                if grad_weight is not None:
                    _accumulate_product(grad_weight, gradient.t(), hidden[span], alpha, first=span.start == 0)
                if grad_bias is not None:
                    grad_bias.add_(gradient.sum(dim=0, dtype=grad_bias.dtype), alpha=alpha)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, alpha: float, buffer: Tensor) -> Tensor:
    """Write `alpha * (hidden @ weight.T + bias)` into the first rows of `buffer`."""
    out = buffer[: hidden.shape[0]]
    if bias is None:
        return out.addmm_(hidden, weight.t(), beta=0, alpha=alpha)
    return torch.addmm(bias, hidden, weight.t(), beta=alpha, alpha=alpha, out=out)


def _logits(product: Tensor, cap: float | None) -> Tensor:
    """Logits in the reduction's dtype; a view of `product` where nothing has to be converted or capped."""
    product = _upcast(product)
    return product if cap is None else torch.tanh(product).mul_(cap)


def _overwrite_with_gradient(
    product: Tensor,
    cap: float | None,
    index: Tensor,
    normaliser: Tensor,
    grad_logps: Tensor,
    grad_entropy: tuple[Tensor, Tensor] | None,
) -> None:
    """Overwrite `product` with the gradient with respect to it; all but `product` are columns `[rows, 1]`."""
    logits = _logits(product, cap)
    # d(cap * tanh(x)) / dx = cap * (1 - tanh(x)^2), written with the logits themselves.
    slope = None if cap is None else (logits * logits).mul_(-1.0 / cap).add_(cap)
    log_p = logits.sub_(normaliser)
    if grad_entropy is None:
        gradient = log_p.exp_().mul_(-grad_logps)
    else:
        entropy, grad = grad_entropy
        factor = (log_p + entropy).mul_(grad).add_(grad_logps).neg_()
        gradient = log_p.exp_().mul_(factor)
    gradient.scatter_add_(1, index, grad_logps.to(gradient.dtype))
    if slope is not None:
        gradient.mul_(slope)
    if gradient.data_ptr() != product.data_ptr():
        product.copy_(gradient)


def _accumulate_product(total: Tensor, left: Tensor, right: Tensor, alpha: float, *, first: bool) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if first else 1, alpha=alpha)
    else:  # chunks of a bfloat16 head are summed in float32
        total.add_(left @ right, alpha=alpha)


def _chunk_rows(hidden: Tensor, weight: Tensor, settings: _Settings) -> int:
    row_bytes = weight.shape[0] * hidden.element_size()
    limit = settings.max_chunk_bytes
    if not settings.needs_grad and hidden.device.type == "cpu":
        limit = min(limit, 32 * 2**20)  # nothing has to be kept, and a CPU gains nothing from larger products
    return max(1, limit // row_bytes)


def _block_rows(matrix: Tensor) -> int:
    """Rows that are reduced at a time: few enough to stay in a CPU's cache, many enough to fill a GPU."""
    limit = 2 * 2**20 if matrix.device.type == "cpu" else 64 * 2**20
    return max(1, limit // (matrix.shape[1] * torch.finfo(_reduction_dtype(matrix.dtype)).bits // 8))


def _spans(rows: int, size: int) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(_reduction_dtype(tensor.dtype))


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    return value


def _check_head(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [n, d], got shape {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [vocabulary, {hidden.shape[1]}], got shape {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], got shape {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
