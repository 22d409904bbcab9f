"""The end of an optimizer step: its gradients divided, clipped and looked at, and what is logged of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.sharded import local, whole

if TYPE_CHECKING:
    from alignment_modules.training.module import AlignmentModule

NO_TARGETS = "labels all -100, empty completions, or groups with fewer than two rewards"


def finish_step(module: AlignmentModule, optimizer: torch.optim.Optimizer) -> None:
    """Divides the gradients by what the step has weighed, clips them where the module does so, and logs.

    Args:
        module: Whose step; `windows` holds what was accumulated.
        optimizer: One of its Trainer's, about to step.
    """
    pairs = zip(module.windows, module.trainer.optimizers, strict=False)
    name = next((name for name, own in pairs if own is optimizer), "policy")
    window, prefix = module.windows[name], "" if name == "policy" else f"{name}/"
    closed, own, due = window.close(module.reduce, module.device), not module.automatic_optimization, module.logging_due
    # Lightning divided each loss by accumulate_grad_batches, and the strategy averaged over ranks.
    parts = module.trainer.world_size * (1 if own else module.trainer.accumulate_grad_batches)
    clips, scale = module.max_grad_norm if own else None, None if closed.empty else parts / closed.divisor
    norm = finish_gradients(optimizer, scale, clips, measure=due)
    if clips is not None:
        tell_clipped(module, optimizer)
    if closed.empty and window.skipped == 1:
        rank_zero_warn(
            f"optimizer step {module.global_step + 1} is skipped: not one target in the batches of all its "
            f"micro-batches and ranks ({NO_TARGETS}). train/steps_without_targets counts such steps"
        )
    elif not closed.empty:  # for callbacks, at each step and without waiting for the device
        module.trainer.callback_metrics[f"train/{prefix}loss"] = closed.loss
    if due:
        measured = {"grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
        for key, value in measured.items():  # None: nothing was divided, or the optimizer sets its own rate
            if value is not None:
                number = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
                module._train_meters.update({f"{prefix}{key}": Statistic(number)})
    if not own:  # before the callbacks' on_train_batch_end
        module.log_step(module.global_step + 1)


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
    own = [local(gradient) for gradient in gradients]
    torch._foreach_mul_(own, scale)
    if max_norm is None and not measure:
        return None
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if max_norm is not None:
        torch._foreach_mul_(own, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def tell_clipped(module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
    """Calls `on_gradients_clipped(trainer, module, optimizer)` of the Trainer's callbacks that define it.

    Lightning has no such hook: its last one comes before it clips.
    """
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        hook = getattr(callback, "on_gradients_clipped", None)
        if hook is not None:
            hook(module.trainer, module, optimizer)
