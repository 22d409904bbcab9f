"""Clipping that is looked at: what it makes of a gradient must be finite, too."""

from typing import Any

import lightning as L
import torch

from alignment_modules.callbacks.finite_guard import FiniteGuard


class GuardedClipping(L.LightningModule):
    """Calls the Trainer's `FiniteGuard` once more after the gradient was clipped."""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's own, then the guard."""
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if gradient_clip_val:
            self.guard(optimizer)

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Checks the gradient as it is now, where the Trainer has a `FiniteGuard`.

        Raises:
            FloatingPointError: If it is not finite and the guard checks at once.
        """
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FiniteGuard):
                callback.check(self.trainer, self, optimizer)
