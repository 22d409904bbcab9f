"""Pieces of a linear head that is computed chunk by chunk: projections, reductions' dtype, spans of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from alignment_modules.functional.checks import check_positive


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of reductions: float64 stays, all else becomes float32."""
    return tensor.to(reduction_dtype(tensor.dtype))


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def factor_and_cap(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float | None]:
    """What multiplies a head's product, and the bound of its hyperbolic tangent (None: there is no tangent).

    Args:
        logit_scale: Multiplies the head's output.
        softcap: Bound of the soft-capped logits, > 0, or None.
        temperature: Divides the final logits, > 0.

    Raises:
        ValueError: If `softcap` or `temperature` is not positive.
    """
    check_positive("temperature", temperature)
    if softcap is None:
        return logit_scale / temperature, None
    return logit_scale / check_positive("softcap", softcap), softcap / temperature


def in_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """States and head in the dtype that `nn.Linear` would take under the autocast that is on."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return hidden, weight, bias


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Compares the shapes of states and head.

    Args:
        hidden: Should be `[n, d]`.
        weight: Should be `[vocabulary, d]`.
        bias: Should be `[vocabulary]` or None.
        prefix: What stands before the names in a message.

    Raises:
        ValueError: If one has another shape.
    """
    if hidden.dim() != 2:
        raise ValueError(f"{prefix}hidden must be [n, d], got shape {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{prefix}weight must be [vocabulary, {hidden.shape[1]}], got shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, alpha: float, buffer: Tensor) -> Tensor:
    """Write `alpha * (hidden @ weight.T + bias)` into the first rows of `buffer`."""
    out = buffer[: hidden.shape[0]]
    if bias is None:
        return out.addmm_(hidden, weight.t(), beta=0, alpha=alpha)
    return torch.addmm(bias, hidden, weight.t(), beta=alpha, alpha=alpha, out=out)


def capped(product: Tensor, cap: float | None) -> Tensor:
    """Logits in the reduction's dtype; a view of `product` where nothing has to be converted or capped."""
    product = upcast(product)
    return product if cap is None else torch.tanh(product).mul_(cap)


def cap_slope(logits: Tensor, cap: float | None) -> Tensor | None:
    """d(cap * tanh(x)) / dx = cap * (1 - tanh(x)^2), written with the logits themselves; None where it is 1."""
    return None if cap is None else (logits * logits).mul_(-1.0 / cap).add_(cap)


def accumulate_product(total: Tensor, left: Tensor, right: Tensor, alpha: float, *, first: bool) -> None:
    """Add `alpha * left @ right` to `total`; the first time, write it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if first else 1, alpha=alpha)
    else:  # chunks of a bfloat16 head are summed in float32
        total.add_(left @ right, alpha=alpha)


def chunk_rows(row_bytes: int, limit: int, device_type: str, *, kept: bool) -> int:
    """How many rows to project at a time.

    Args:
        row_bytes: Bytes of a row's logits.
        limit: Most bytes of a chunk.
        device_type: Where.
        kept: Whether the chunk may have to be kept for the backward pass.
    """
    if not kept and device_type == "cpu":
        limit = min(limit, 32 * 2**20)  # nothing has to be kept, and a CPU gains nothing from larger products
    return max(1, limit // row_bytes)


def blocks(matrix: Tensor, span: slice, *, temporaries: bool = True) -> Iterator[tuple[slice, slice]]:
    """Rows to reduce at a time, counted in `matrix` and in all rows: all of them where that needs no temporaries.

    Smaller blocks would stay in a CPU's cache, but each costs its threads a barrier, which on busy cores takes longer
    than the memory traffic that it saves.
    """
    size = matrix.shape[0]
    if temporaries:
        limit = (8 if matrix.device.type == "cpu" else 64) * 2**20
        size = limit // (matrix.shape[1] * torch.finfo(reduction_dtype(matrix.dtype)).bits // 8)
    for block in spans(matrix.shape[0], max(size, 1)):
        yield block, slice(span.start + block.start, span.start + block.stop)


def spans(rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
