"""Manual optimization for every online paradigm: several optimizer steps a batch, each exactly normalised."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from alignment_modules.base import AlignmentModule
from alignment_modules.functional.ranges import Positive, check_options
from alignment_modules.objective import Statistic


class ManualOptimizationModule(AlignmentModule):
    """Base of paradigms that take their own optimizer steps.

    Lightning then neither accumulates nor clips nor steps the schedule; this class does, and refuses the Trainer's own
    switches by name. An optimizer step is accumulated over micro-batches and normalised by their summed weight.

    Args:
        max_grad_norm: Largest gradient norm, applied to the normalised, unscaled gradients; None: no clipping.
        **common: Keywords of `AlignmentModule`.
    """

    def __init__(self, *, max_grad_norm: Positive | None = 1.0, **common: Any) -> None:
        check_options(ManualOptimizationModule.__init__, locals())
        super().__init__(**common)
        self.automatic_optimization = False
        self.max_grad_norm = max_grad_norm

    @property
    def optimizer_steps_per_batch(self) -> int:
        """Optimizer steps taken for each batch of the dataloader."""
        return 1

    @property
    def total_optimizer_steps(self) -> int | float:
        """Optimizer steps of the whole run: Lightning's own estimate counts one a batch."""
        steps, limit = self.trainer.estimated_stepping_batches * self.optimizer_steps_per_batch, self.trainer.max_steps
        return steps if limit == -1 else min(steps, limit)

    def configure_callbacks(self) -> list[Any]:
        """Adds none; it is the only hook that runs before Lightning's own check, whose error knows no way out.

        Raises:
            ValueError: If the Trainer accumulates or clips gradients, which manual optimization would ignore.
        """
        trainer, name = self.trainer, type(self).__name__
        if trainer.training and trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) is not allowed with {name}, "
                "which accumulates by itself: leave it at 1 and set micro_batch_size on the module"
            )
        if trainer.training and trainer.gradient_clip_val:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) is not allowed with {name}, "
                "which clips by itself: remove it and set max_grad_norm on the module"
            )
        return []

    def require_trainer(self) -> None:
        """Says what to do where there is no Trainer.

        Raises:
            RuntimeError: If the module is used without one.
        """
        if self._trainer is None:
            raise RuntimeError(
                f"{type(self).__name__}.training_step takes optimizer steps of its own and needs a Trainer: call "
                "Trainer.fit(module, ...). In a loop of your own (L.Fabric), call objective() and step yourself"
            )

    def optimizer_step_over(self, micro_batches: Sequence[Any], empty: Any) -> None:
        """One optimizer step: the gradients of all micro-batches, normalised, clipped, applied; then the schedule.

        Args:
            micro_batches: What `objective` takes, each.
            empty: A micro-batch without a scored token, with which a rank that has fewer keeps step with the others.
        """
        self.require_trainer()
        started = monotonic()
        count = int(self.reduce(torch.tensor(max(len(micro_batches), 1), device=self.device), "max"))
        padded = [*micro_batches, *[empty] * (count - len(micro_batches))]
        optimizer: Any = self.optimizers()
        for number, micro_batch in enumerate(padded, start=1):
            with self._gradient_sync(last=number == count):
                self.manual_backward(self.scaled(self.record(micro_batch)))
        optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        self._train_meters.update({"time/update": Statistic(torch.tensor(monotonic() - started))})
        self.log_step(self.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Normalises and clips; the guard looks once more at what was clipped."""
        super().on_before_optimizer_step(optimizer)
        if self.max_grad_norm is not None:
            self.guard(optimizer)

    def clip(self, gradients: list[Tensor]) -> Tensor | None:
        """Scales the gradients down to `max_grad_norm`."""
        if self.max_grad_norm is None:
            return None
        norm = torch.nn.utils.get_total_norm(gradients)
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
        return norm

    def _gradient_sync(self, *, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients only with the last micro-batch of a step."""
        if hasattr(self.policy, "set_requires_gradient_sync"):
            self.policy.set_requires_gradient_sync(last)  # type: ignore[operator]  # FSDP2
        if last or not hasattr(self.trainer.strategy, "block_backward_sync"):
            return nullcontext()
        return self.trainer.strategy.block_backward_sync()
