"""Learning-rate schedules counted in optimizer steps.

Every schedule is a closed form of the number of optimizer steps already taken, so a resumed run continues exactly, and
a checkpoint holds plain numbers only. Step `s` below counts from 0: the first optimizer step has `s = 0`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from alignment_modules.functional.ranges import MAX_INT, Count, Natural, Range, Share, check_options

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "InverseSquareRootSchedule",
    "LinearSchedule",
    "Schedule",
    "WarmupStableDecaySchedule",
    "bind_total_steps",
]

StartIndex = Annotated[int, Range(-1, MAX_INT)]
_FORMS: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 * (1.0 + math.cos(math.pi * (1.0 - left))),
    "sqrt": lambda left: 1.0 - math.sqrt(1.0 - left),
}
"""What is left of a rate that falls from 1 to 0, by the share of the decay that is left."""


class Schedule(LRScheduler):
    """A learning rate that is a closed form of the optimizer step: `lr = base_lr * factor(s)`.

    During warmup the factor is `(s + 1) / warmup_steps`, so the first step already learns. After it a subclass follows
    the form called `shape`, or gives a `decay(s)` of its own. Settings come from the constructor, never from a
    checkpoint: a run that is resumed with a longer `total_steps` follows the longer schedule from there on.

    Args:
        optimizer: The optimizer whose groups are scheduled.
        warmup_steps: Optimizer steps of linear warmup.
        total_steps: Optimizer steps of the whole run; None: the Trainer's, given later by `bind_total_steps`.
        last_epoch: torch's start index; leave it at -1.

    Raises:
        ValueError: If `warmup_steps` is negative or more than `total_steps`, or `total_steps` is not positive.
    """

    needs_total_steps = True
    shape: str = "linear"
    floor: float = 0.0

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: Natural = 0,
        total_steps: Count | None = None,
        last_epoch: StartIndex = -1,
    ) -> None:
        check_options(Schedule.__init__, locals())
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        if total_steps is not None:
            self._check_total(total_steps)
        super().__init__(optimizer, last_epoch)

    @property
    def minimum_total_steps(self) -> int:
        """The shortest run, in optimizer steps, that holds all phases."""
        return max(self.warmup_steps, 1)

    def _check_total(self, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps} must be 1 or more")
        if self.warmup_steps > total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must not be more than total_steps={total_steps} (in optimizer steps)"
            )

    def _decay_length(self, total_steps: int) -> int:
        """Optimizer steps at the end of the run over which the rate falls."""
        return total_steps - self.warmup_steps

    def decay(self, step: int) -> float:
        """Factor on the base rate at `step >= warmup_steps`: 1, then `floor + (1 - floor) * form(share left)`."""
        total_steps = self.total_steps or 0
        length = self._decay_length(total_steps)
        if step < total_steps - length:
            return 1.0
        left = min(1.0, (total_steps - step) / length) if step < total_steps else 0.0
        return self.floor + (1.0 - self.floor) * _FORMS[self.shape](left)

    def factor(self, step: int) -> float:
        """Factor on the base rate at optimizer step `step`, counted from 0.

        Raises:
            ValueError: If the step lies after the warmup, the schedule depends on its end, and the end is not known.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.needs_total_steps and self.total_steps is None:
            if step == 0:  # the constructor asks for step 0's rate before anybody could bind the total
                return 1.0
            raise ValueError(
                f"total_steps=None: {type(self).__name__} needs the number of optimizer steps of the whole run; "
                "give total_steps or call bind_total_steps before the first step"
            )
        return self.decay(step)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Learning rate of each parameter group for the coming optimizer step."""
        factor = self.factor(max(self.last_epoch, 0))
        return [base * factor for base in self.base_lrs]

    def _apply(self) -> None:
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = list(rates)

    def state_dict(self) -> dict[str, Any]:
        """Progress only, in plain numbers: loadable with `weights_only=True`."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "base_lrs": list(self.base_lrs),
            "_last_lr": list(self._last_lr),
            "total_steps": self.total_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after the saved step; the saved `total_steps` counts only where none is known here.

        Args:
            state_dict: What `state_dict` gave.

        Raises:
            ValueError: If `state_dict` is not a scheduler's state, or was made for another number of parameter groups.
        """
        missing = [key for key in ("last_epoch", "base_lrs") if key not in state_dict]
        if missing:
            raise ValueError(
                f"state_dict lacks {missing}; it is not the state of a schedule: found {sorted(state_dict)}"
            )
        if len(state_dict["base_lrs"]) != len(self.optimizer.param_groups):
            raise ValueError(
                f"state_dict has base_lrs for {len(state_dict['base_lrs'])} parameter groups, "
                f"the optimizer has {len(self.optimizer.param_groups)}"
            )
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict.get("_step_count", self.last_epoch + 1)
        self.base_lrs = list(state_dict["base_lrs"])
        if self.total_steps is None:
            self.total_steps = state_dict.get("total_steps")
        self._apply()


class ConstantSchedule(Schedule):
    """Warmup, then the base rate for ever; `total_steps` is only checked against `warmup_steps`."""

    needs_total_steps = False

    def decay(self, step: int) -> float:
        """Always 1."""
        return 1.0


class LinearSchedule(Schedule):
    """Warmup, then a straight line down to `floor * base_lr`, reached just after the last step.

    Args:
        optimizer: The optimizer whose groups are scheduled.
        warmup_steps: Optimizer steps of linear warmup.
        total_steps: Optimizer steps of the whole run; None: the Trainer's.
        floor: Share of the base rate at the end, within [0, 1].
        last_epoch: torch's start index; leave it at -1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: Natural = 0,
        total_steps: Count | None = None,
        floor: Share = 0.0,
        last_epoch: StartIndex = -1,
    ) -> None:
        check_options(LinearSchedule.__init__, locals())
        self.floor = floor
        super().__init__(optimizer, warmup_steps, total_steps, last_epoch)


class CosineSchedule(LinearSchedule):
    """Warmup, then half a cosine down to `floor * base_lr` (Loshchilov and Hutter, arXiv:1608.03983, one cycle)."""

    shape = "cosine"


class WarmupStableDecaySchedule(LinearSchedule):
    """Warmup, a plateau at the base rate, and a decay over the last steps (WSD; Hu et al., arXiv:2404.06395).

    Args:
        optimizer: The optimizer whose groups are scheduled.
        warmup_steps: Optimizer steps of linear warmup.
        total_steps: Optimizer steps of the whole run; None: the Trainer's.
        decay_steps: Optimizer steps of the decay; None: `decay_share` of the run.
        decay_share: Share of the run that decays where `decay_steps` is None, within (0, 1]; at least one step.
        shape: "linear", "cosine" or "sqrt" (`1 - sqrt(progress)`, Haegele et al., arXiv:2405.18392).
        floor: Share of the base rate at the end, within [0, 1].
        last_epoch: torch's start index; leave it at -1.

    Raises:
        ValueError: If the phases do not fit in `total_steps`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: Natural = 0,
        total_steps: Count | None = None,
        decay_steps: Natural | None = None,
        decay_share: Annotated[float, Range(0, 1, "(]")] = 0.1,
        shape: Literal["linear", "cosine", "sqrt"] = "linear",
        floor: Share = 0.0,
        last_epoch: StartIndex = -1,
    ) -> None:
        check_options(WarmupStableDecaySchedule.__init__, locals())
        if decay_steps is None and decay_share == 1.0 and warmup_steps:
            raise ValueError(f"decay_share=1.0 leaves no room for warmup_steps={warmup_steps}")
        self.decay_steps = decay_steps
        self.decay_share = decay_share
        self.shape = shape
        super().__init__(optimizer, warmup_steps, total_steps, floor, last_epoch)

    @property
    def minimum_total_steps(self) -> int:
        """The shortest run, in optimizer steps, that holds all phases."""
        if self.decay_steps is not None:
            return max(self.warmup_steps + self.decay_steps, 1)
        if self.decay_share == 1.0:
            return 1
        return max(self.warmup_steps + 1, math.ceil((self.warmup_steps + 0.5) / (1.0 - self.decay_share)))

    def _decay_length(self, total_steps: int) -> int:
        return self.decay_steps if self.decay_steps is not None else max(1, round(self.decay_share * total_steps))

    def _check_total(self, total_steps: int) -> None:
        super()._check_total(total_steps)
        decay_steps = self._decay_length(total_steps)
        if self.warmup_steps + decay_steps > total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and decay_steps={decay_steps} together must not be more than "
                f"total_steps={total_steps} (in optimizer steps)"
            )


class InverseSquareRootSchedule(Schedule):
    """Warmup, then `sqrt(timescale / (timescale + s + 1 - warmup_steps))`; it has no end (Vaswani et al., 1706.03762).

    With the default timescale this is `sqrt(warmup_steps / (s + 1))`.

    Args:
        optimizer: The optimizer whose groups are scheduled.
        warmup_steps: Optimizer steps of linear warmup.
        total_steps: Optimizer steps of the whole run; only checked against `warmup_steps`.
        timescale: Steps after the warmup until the rate has fallen to `1 / sqrt(2)`; None: `warmup_steps`, or 10,000
            without a warmup.
        last_epoch: torch's start index; leave it at -1.
    """

    needs_total_steps = False

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: Natural = 0,
        total_steps: Count | None = None,
        timescale: Count | None = None,
        last_epoch: StartIndex = -1,
    ) -> None:
        check_options(InverseSquareRootSchedule.__init__, locals())
        self.timescale = timescale or warmup_steps or 10_000
        super().__init__(optimizer, warmup_steps, total_steps, last_epoch)

    def decay(self, step: int) -> float:
        """`sqrt(timescale / (timescale + s + 1 - warmup_steps))`."""
        return math.sqrt(self.timescale / (self.timescale + step + 1 - self.warmup_steps))


def bind_total_steps(scheduler: Any, total_steps: int | float, *, strict: bool = True) -> None:
    """Tells a schedule the length of the run where its `total_steps` is None, and applies the rate of its current step.

    Schedulers that are not of this module are left alone.

    Args:
        scheduler: Any learning-rate scheduler.
        total_steps: Optimizer steps of the whole run; `math.inf` without an end, less than 1 where it is unknown.
        strict: False lengthens a total that is too short for the phases, for rehearsals such as `fast_dev_run`.

    Raises:
        ValueError: If the schedule depends on the run's end and there is none, or (strict) its phases do not fit.
    """
    if not isinstance(scheduler, Schedule) or scheduler.total_steps is not None:
        return
    if not math.isfinite(total_steps) or total_steps < 1:
        if not scheduler.needs_total_steps:
            return
        unknown = " (the training loader has no length, or limit_train_batches is 0, so max_epochs gives no number)"
        raise ValueError(
            f"total_steps={total_steps}: {type(scheduler).__name__} needs a run with an end; set the Trainer's "
            f"max_steps{' or max_epochs' if total_steps == math.inf else unknown}, or the schedule's own total_steps"
        )
    total = max(int(total_steps), 1 if strict else scheduler.minimum_total_steps)
    scheduler._check_total(total)
    scheduler.total_steps = total
    scheduler._apply()
