"""Divergences between the next-token distributions of a student and a teacher, over the whole vocabulary.

With `T` and `S` the probabilities of teacher and student, both at the same temperature:

| kind | divergence | gradient with respect to the student's logits, times the temperature |
|---|---|---|
| `forward` | `KL(T || S) = sum T log(T / S)` | `S - T` |
| `reverse` | `KL(S || T) = sum S log(S / T)` | `S (log(S / T) - KL(S || T))` |
| `jsd` | `b KL(T || M) + (1 - b) KL(S || M)`, `M = b T + (1 - b) S` | `(1 - b) S (log(S / M) - KL(S || M))` |

`forward` is Hinton's distillation (arXiv:1503.02531, equation 2, without the factor of the squared temperature),
`reverse` MiniLLM's (arXiv:2306.08543, equation 1), `jsd` the generalised Jensen-Shannon divergence of GKD
(arXiv:2306.13649, equation 1). Towards both ends of `b` the last one tends to 0, not to the two others, whose gradients
are 4 to 11 times as large as those of the values that are allowed: `b` is therefore held to [0.05, 0.95].
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignment_modules.functional.checks import check_positive, check_same_shape
from alignment_modules.functional.head_chunks import (
    accumulate_product,
    blocks,
    cap_slope,
    capped,
    check_head,
    chunk_rows,
    factor_and_cap,
    in_autocast,
    project,
    reduction_dtype,
    spans,
)
from alignment_modules.functional.ranges import Positive, Range, check_options

Divergence = Literal["forward", "reverse", "jsd"]
"""Names of the divergences; see the module's table."""

JsdBeta = Annotated[float, Range(0.05, 0.95)]
"""Share of the teacher in the mixture of "jsd"."""


def distribution_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: Divergence = "reverse",
    jsd_beta: JsdBeta = 0.5,
    temperature: Positive = 1.0,
) -> Tensor:
    """Divergence of each position, differentiable in the student's logits; the teacher's are constants.

    Args:
        student_logits: `[..., vocabulary]`, finite.
        teacher_logits: `[..., vocabulary]`, finite.
        kind: "forward", "reverse" or "jsd"; see the module's table.
        jsd_beta: Share of the teacher in the mixture of "jsd", from 0.05 to 0.95. The ends are no divergences of this
            kind: "forward" and "reverse" have names of their own.
        temperature: Divides the logits of both, > 0. No factor makes up for it.

    Returns:
        `[...]` in nats, at least 0 up to rounding; float32 (float64 for float64 logits).

    Raises:
        ValueError: If shapes differ or an option has a value that is not allowed.

    Example:
        >>> teacher, student = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
        >>> [round(distribution_divergence(student, teacher, kind=k).item(), 6) for k in ("forward", "reverse", "jsd")]
        [0.634897, 0.675806, 0.151358]
    """
    check_options(distribution_divergence, locals())
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    dtype = reduction_dtype(student_logits.dtype)
    student = torch.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=-1)
    if kind == "forward":
        return _kl(teacher, student)
    if kind == "reverse":
        return _kl(student, teacher)
    mixture = _mixture(student, teacher, jsd_beta)
    return jsd_beta * _kl(teacher, mixture) + (1 - jsd_beta) * _kl(student, mixture)


class LinearHead(NamedTuple):
    """A head's parts: `logits = softcap(scale * (hidden @ weight.T + bias))`.

    Attributes:
        weight: `[vocabulary, d]`.
        bias: `[vocabulary]` or None.
        scale: Multiplies the product.
        softcap: Bound of a hyperbolic tangent; None: there is none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def linear_divergence(
    hidden: Tensor,
    head: LinearHead,
    teacher_hidden: Tensor,
    teacher_head: LinearHead,
    *,
    kind: Divergence = "reverse",
    jsd_beta: JsdBeta = 0.5,
    temperature: Positive = 1.0,
    max_chunk_bytes: int = 256 * 2**20,
) -> Tensor:
    """`distribution_divergence` of two heads' logits, which are made chunk by chunk and never held for all positions.

    Differentiable in the student's states, weight and bias by the closed form of the module's table. What the backward
    pass needs is one number a position; where all positions fit in one chunk, it keeps the gradient of their logits
    and computes nothing again.

    Args:
        hidden: `[n, d]` states of the student.
        head: The student's head.
        teacher_hidden: `[n, e]` states of the teacher, constants.
        teacher_head: The teacher's head, constant, over the same vocabulary.
        kind: As in `distribution_divergence`.
        jsd_beta: As in `distribution_divergence`.
        temperature: As in `distribution_divergence`.
        max_chunk_bytes: Most bytes of each of the two chunks of logits.

    Returns:
        `[n]` in nats, float32 (float64 for float64 states).

    Raises:
        ValueError: If shapes do not fit or an option has a value that is not allowed.
    """
    check_options(linear_divergence, locals())
    check_positive("max_chunk_bytes", max_chunk_bytes)
    check_head(hidden, head.weight, head.bias)
    check_head(teacher_hidden, teacher_head.weight, teacher_head.bias, "teacher's ")
    if len(hidden) != len(teacher_hidden) or len(head.weight) != len(teacher_head.weight):
        raise ValueError(
            f"student and teacher must have as many positions and tokens, got {len(hidden)} and {len(teacher_hidden)} "
            f"positions, {len(head.weight)} and {len(teacher_head.weight)} tokens"
        )
    student = in_autocast(hidden, head.weight, head.bias)
    given = (teacher_hidden, teacher_head.weight, teacher_head.bias)
    teacher = in_autocast(*(None if part is None else part.detach() for part in given))  # type: ignore[arg-type]
    needs_grad = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in student)
    settings = _Settings(
        kind,
        jsd_beta,
        *factor_and_cap(head.scale, head.softcap, temperature),
        *factor_and_cap(teacher_head.scale, teacher_head.softcap, temperature),
        max_chunk_bytes,
        needs_grad,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearDivergence.apply(*student, teacher, settings)


class _Settings(NamedTuple):
    kind: Divergence
    jsd_beta: float
    alpha: float  # multiplies the student's product
    cap: float | None
    teacher_alpha: float
    teacher_cap: float | None
    max_chunk_bytes: int
    needs_grad: bool


_Parts = tuple[Tensor, Tensor, Tensor | None]  # states, weight, bias


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: _Parts, settings: _Settings
    ) -> Tensor:
        rows, row_bytes = len(hidden), len(weight) * max(hidden.element_size(), teacher[0].element_size())
        chunk = chunk_rows(row_bytes, settings.max_chunk_bytes, hidden.device.type, kept=settings.needs_grad)
        keep = settings.needs_grad and chunk >= rows
        values = torch.empty(rows, dtype=reduction_dtype(hidden.dtype), device=hidden.device)
        products = _Products(hidden, weight, bias, teacher, settings, min(chunk, rows))
        for span in spans(rows, chunk):
            values[span] = products.reduce(span, gradient=keep)
        ctx.settings, ctx.chunk = settings, chunk
        ctx.gradient = products.student if keep else None
        ctx.save_for_backward(hidden, weight, bias, *teacher)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *teacher = ctx.saved_tensors
        settings, chunk = ctx.settings, ctx.chunk
        # What was kept is overwritten below, so a second backward through the same graph computes it again.
        kept, ctx.gradient = ctx.gradient, None
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = hidden.dtype if chunk >= len(hidden) else upstream.dtype
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_weight else None
        grad_bias = upstream.new_zeros(len(weight)) if needs_bias else None
        products = None
        with torch.autocast(hidden.device.type, enabled=False):
            if kept is None:
                products = _Products(hidden, weight, bias, tuple(teacher), settings, min(chunk, len(hidden)))
            for span in spans(len(hidden), chunk):
                if products is not None:
                    products.reduce(span, gradient=True)
                    gradient = products.student[: span.stop - span.start]
                else:
                    gradient = kept
                gradient.mul_(upstream[span, None])
                if grad_hidden is not None:
                    grad_hidden[span].addmm_(gradient, weight, beta=0, alpha=settings.alpha)
                if grad_weight is not None:
                    first = span.start == 0
                    accumulate_product(grad_weight, gradient.t(), hidden[span], settings.alpha, first=first)
                if grad_bias is not None:
                    grad_bias.add_(gradient.sum(dim=0, dtype=grad_bias.dtype), alpha=settings.alpha)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


class _Products:
    """The two heads' products of a chunk of rows, in buffers that every chunk uses again."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Any, settings: _Settings, rows: int
    ) -> None:
        self.parts, self.teacher_parts, self.settings = (hidden, weight, bias), teacher, settings
        self.student = hidden.new_empty(rows, len(weight))
        self.teacher = teacher[0].new_empty(rows, len(weight))

    def reduce(self, span: slice, *, gradient: bool) -> Tensor:
        """Divergences `[rows]` of a span; leaves the gradient of the student's products in `student` if asked."""
        ours = self._project(self.parts, span, self.settings.alpha, self.student)
        theirs = self._project(self.teacher_parts, span, self.settings.teacher_alpha, self.teacher)
        found = [
            _reduce(ours[block], theirs[block], self.settings, gradient)
            for block, _ in blocks(ours if ours.dtype.itemsize >= theirs.dtype.itemsize else theirs, span)
        ]
        return torch.cat(found)

    @staticmethod
    def _project(parts: _Parts, span: slice, alpha: float, buffer: Tensor) -> Tensor:
        hidden, weight, bias = parts
        return project(hidden[span], weight, bias, alpha, buffer)


def _reduce(product: Tensor, teacher_product: Tensor, settings: _Settings, gradient: bool) -> Tensor:
    """Divergences `[rows]` of products `[rows, vocabulary]`; overwrites `product` with their gradient if asked."""
    logits = capped(product, settings.cap)
    slope = cap_slope(logits, settings.cap) if gradient else None
    student = torch.log_softmax(logits, dim=-1)
    teacher = torch.log_softmax(capped(teacher_product, settings.teacher_cap).to(student), dim=-1)
    probabilities = student.exp()
    if settings.kind == "forward":
        values, change = _kl(teacher, student), probabilities - teacher.exp()
    else:
        share = settings.jsd_beta if settings.kind == "jsd" else 0.0
        other = _mixture(student, teacher, share) if share else teacher
        ratio = student.sub_(other)
        own = (probabilities * ratio).sum(dim=-1)
        values = share * _kl(teacher, other) + (1 - share) * own if share else own
        change = ratio.sub_(own[:, None]).mul_(probabilities).mul_(1 - share)
    if gradient:
        product.copy_(change if slope is None else change.mul_(slope))
    return values


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """KL of two tensors of log-probabilities, over the last dimension."""
    return (one.exp() * (one - other)).sum(dim=-1)


def _mixture(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """Log-probabilities of the mixture in which the teacher has a share."""
    return torch.logaddexp(teacher + math.log(share), student + math.log1p(-share))
