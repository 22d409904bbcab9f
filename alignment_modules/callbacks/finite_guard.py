"""Stops a run whose gradient is NaN or infinite before it ruins the weights."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import Optimizer

from alignment_modules.functional.ranges import check_options
from alignment_modules.policies.sharded import local

_LARGEST_IN_NORM = 1e18  # the sum of squares of many more such entries overflows float32


class FiniteGuard(Callback):
    """Raises when the gradient of an optimizer step is not finite, naming the step and the parameter.

    On the CPU every step is checked before it is taken. Elsewhere, so as not to make the host wait for the device, a
    gradient that is not finite is set to zero on the device, and the error is raised at the next logging step
    (`log_every_n_steps`), before the next checkpoint, or at the end, whichever comes first; it names the step at which
    it happened. The modules of this library call the guard again after they, or the Trainer, clipped. Where gradients
    are clipped by their norm, finite ones so large that the norm overflows count as not finite: they would be scaled to
    zero. With `precision="16-mixed"` the gradient scaler skips such steps itself; the guard leaves them to it.

    Args:
        every_step: Whether every step is checked before it is taken; None: on the CPU only.
    """

    def __init__(self, every_step: bool | None = None) -> None:
        check_options(FiniteGuard.__init__, locals())
        self.every_step = every_step
        self._names: list[str] = []
        self._first_step: Tensor | None = None
        self._first_norms: Tensor | None = None
        self._limit = torch.finfo(torch.float32).max

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets what another run left."""
        self._names, self._first_step, self._first_norms = [], None, None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Checks the gradient, or notes on the device that it was not finite.

        Raises:
            FloatingPointError: If it is not finite and this step is one that is checked at once.
        """
        self.on_gradients_clipped(trainer, pl_module, optimizer)

    def on_gradients_clipped(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """The same of what is left after clipping; modules of this library call it there."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        gradients = [_values(parameter.grad) for parameter in parameters]
        device, sharded = pl_module.device, any(hasattr(parameter, "to_local") for parameter in parameters)
        # the largest magnitude, not the 2-norm: a sum of squares overflows on finite gradients
        norms = torch._foreach_norm([one if one.numel() else one.new_zeros(1) for one in gradients], ord=float("inf"))
        largest = torch.stack([norm.to(device, torch.float32) for norm in norms])
        if sharded:  # each process has a part of each gradient
            # NaN is the largest of nothing
            largest = trainer.strategy.reduce(largest.nan_to_num(float("inf")), reduce_op="max")
        own = None if pl_module.automatic_optimization else getattr(pl_module, "max_grad_norm", None)
        clips = trainer.gradient_clip_val or own
        limit = _LARGEST_IN_NORM if clips else torch.finfo(torch.float32).max
        at_once = device.type == "cpu" if self.every_step is None else self.every_step
        step = trainer.global_step + 1
        if at_once:
            if not bool((largest <= limit).all()):
                raise FloatingPointError(_message(step, _names(pl_module, parameters), largest, limit))
            return
        finite = (largest <= limit).all()
        for gradient in gradients:
            gradient.masked_fill_(~finite.to(gradient.device), 0.0)
        if self._first_step is None or self._first_norms is None or len(self._first_norms) != len(largest):
            self.raise_if_noted()
            self._first_step = torch.full((), -1, dtype=torch.long, device=device)
            self._first_norms = torch.zeros_like(largest)
            self._names, self._limit = _names(pl_module, parameters), limit
        is_first = ~finite & (self._first_step < 0)
        self._first_norms = torch.where(is_first, largest, self._first_norms)
        self._first_step = torch.where(is_first, step, self._first_step)
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and step % interval == 0:
            self.raise_if_noted()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lets no checkpoint be written after a step that was not finite."""
        self.raise_if_noted()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports what no logging step has reported."""
        self.raise_if_noted()

    def raise_if_noted(self) -> None:
        """Waits for the device and raises if a gradient was not finite.

        Raises:
            FloatingPointError: If so.
        """
        if self._first_step is None or self._first_norms is None:
            return
        step = int(self._first_step)
        if step >= 0:
            message = _message(step, self._names, self._first_norms, self._limit)
            self._first_step = None  # reported once: the checkpoint that a failing run leaves behind may be written
            raise FloatingPointError(message)


def _values(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise TypeError("a parameter without gradient has none to check")
    own = local(gradient)
    return own._values() if own.is_sparse else own


def _names(module: L.LightningModule, parameters: list[Any]) -> list[str]:
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    return [known.get(id(parameter), f"parameter {row}") for row, parameter in enumerate(parameters)]


def _message(step: int, names: list[str], largest: Tensor, limit: float) -> str:
    bad = (~(largest <= limit)).nonzero().flatten().tolist()
    others = (
        f" and {len(bad) - 1} more of {len(names)} parameters" if len(bad) > 1 else f" (of {len(names)} parameters)"
    )
    return (
        f"the gradient of optimizer step {step} is not finite: its largest entry is {largest[bad[0]].item()} for "
        f"{names[bad[0]]!r}{others}; the weights were not updated with it. Lower the learning rate, clip gradients, or "
        "look at this step's batch."
    )
