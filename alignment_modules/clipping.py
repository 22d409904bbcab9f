"""The gradients of a step before it is taken: divided, clipped and looked at."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from alignment_modules.callbacks.finite_guard import FiniteGuard


def finish_gradients(
    optimizer: torch.optim.Optimizer, scale: Tensor | float | None, max_norm: float | None, *, measure: bool
) -> Tensor | None:
    """Multiplies an optimizer's gradients in place, and clips them.

    Args:
        optimizer: Whose gradients.
        scale: What they are multiplied by; None: they are taken away, and an optimizer leaves a parameter without one,
            and its state, alone.
        max_norm: Largest norm; None: not clipped.
        measure: Whether the norm is wanted where nothing is clipped.

    Returns:
        The norm before clipping, 0-dim; None where it was not needed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if scale is None:
        for parameter in parameters:
            parameter.grad = None
        return None
    gradients: list[Any] = [p.grad for p in parameters]
    torch._foreach_mul_(gradients, scale)
    if max_norm is None and not measure:
        return None
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def guard(module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
    """Checks the gradient as it is now, where the Trainer has a `FiniteGuard`.

    Raises:
        FloatingPointError: If it is not finite and the guard checks at once.
    """
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, FiniteGuard):
            callback.check(module.trainer, module, optimizer)
