"""Clipping that is looked at: what it makes of a gradient must be finite, too."""

import lightning as L
import torch
from torch import Tensor

from alignment_modules.callbacks.finite_guard import FiniteGuard


def clip_to_norm(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scales gradients down in place, so that their norm is at most `max_norm`.

    Returns:
        Their norm before that, 0-dim.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def guard(module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
    """Checks the gradient as it is now, where the Trainer has a `FiniteGuard`.

    Raises:
        FloatingPointError: If it is not finite and the guard checks at once.
    """
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, FiniteGuard):
            callback.check(module.trainer, module, optimizer)
