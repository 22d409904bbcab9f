"""The two functions that a module makes its optimizer and its schedule with."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def check_makers(optimizer: Any, lr_scheduler: Any) -> None:
    """Refuses an optimizer or schedule that was made already: only the module knows its parameter groups.

    Args:
        optimizer: Anything that can be called with parameter groups.
        lr_scheduler: Anything that can be called with an optimizer; None: no schedule.

    Raises:
        ValueError: If one is an object made already, or cannot be called.
    """
    _check("optimizer", optimizer, (Optimizer,), "parameters", "torch.optim.AdamW(parameters, lr=1e-5)")
    if lr_scheduler is not None:
        known = (LRScheduler, ReduceLROnPlateau)
        _check("lr_scheduler", lr_scheduler, known, "optimizer", "CosineSchedule(optimizer, warmup_steps=100)")


def check_rate(optimizer: Optimizer) -> None:
    """Refuses a schedule for an optimizer that sets its own learning rate.

    Raises:
        ValueError: If a parameter group has no rate.
    """
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"lr_scheduler needs a learning rate to start from, but {type(optimizer).__name__} sets its own (lr=None): "
            "give the optimizer lr, or leave lr_scheduler out"
        )


def _check(name: str, maker: Any, made: tuple[type, ...], argument: str, example: str) -> None:
    ready = isinstance(maker, made)
    if callable(maker) and not ready:
        return
    found = f"a {type(maker).__name__} that was made already" if ready else repr(maker)
    raise ValueError(
        f"{name} is {found}; allowed is a function that makes one for the module's own {argument}: "
        f"{name}=lambda {argument}: {example}"
    )
