"""What a module trains, and the two functions that it makes an optimizer and a schedule for it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from alignment_modules.policies.frozen import companions
from alignment_modules.training.adapter_rates import set_adapter_rates, warn_of_small_rate
from alignment_modules.training.muon import MuonWithAdamW
from alignment_modules.training.parameter_groups import parameter_groups
from alignment_modules.training.schedules import bind_total_steps

if TYPE_CHECKING:
    from alignment_modules.training.module import AlignmentModule


def check_makers(optimizer: Any, lr_scheduler: Any, *, whose: str = "") -> None:
    """Refuses an optimizer or schedule that was made already: only the module knows its parameter groups.

    Args:
        optimizer: Anything that can be called with parameter groups.
        lr_scheduler: Anything that can be called with an optimizer; None: no schedule.
        whose: What stands before the options' names, such as "critic_".

    Raises:
        ValueError: If one is an object made already, or cannot be called.
    """
    _check(f"{whose}optimizer", optimizer, (Optimizer,), "parameters", "torch.optim.AdamW(parameters, lr=1e-5)")
    if lr_scheduler is not None:
        known = (LRScheduler, ReduceLROnPlateau)
        _check(f"{whose}lr_scheduler", lr_scheduler, known, "optimizer", "CosineSchedule(optimizer, warmup_steps=100)")


def check_entries(module: nn.Module, entries: Mapping[str, nn.Module], *, several: bool) -> None:
    """Checks that what a module says it trains is all of it, and each parameter once.

    Args:
        module: The module.
        entries: Its `trained()`: what each of its optimizers moves, by name.
        several: Whether it may have more than one.

    Raises:
        ValueError: If there is no entry "policy", more than are allowed, or a trainable parameter that is in none or in
            two.
    """
    name, names = type(module).__name__, ", ".join(entries)
    if "policy" not in entries:
        raise ValueError(f"{name}.trained() gives {names or 'nothing'}; it must have an entry 'policy'")
    if len(entries) > 1 and not several:
        raise ValueError(
            f"{name}.trained() gives {names}, an optimizer each, and automatic optimization has one: derive the module "
            "from UpdateModule, which steps each of them by name"
        )
    owners: dict[int, str] = {}
    for entry, part in entries.items():
        for parameter_name, parameter in part.named_parameters():
            if parameter.requires_grad and owners.setdefault(id(parameter), entry) != entry:
                raise ValueError(
                    f"{name}.trained(): {parameter_name!r} of {entry!r} belongs to {owners[id(parameter)]!r} too; a "
                    "parameter has one optimizer"
                )
    left = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in owners]
    if left:
        raise ValueError(
            f"{name}.trained() leaves out {left[0]!r} and {len(left) - 1} more trainable parameters: put them into an "
            f"entry ({names}), or freeze them (requires_grad_(False))"
        )


def make_optimizers(module: AlignmentModule, entries: Mapping[str, nn.Module]) -> Any:
    """An optimizer, and a schedule that counts its steps, for each entry, as Lightning takes them.

    Args:
        module: Says what makes them.
        entries: Its `trained()`.

    Raises:
        ValueError: If the entries are not a partition of what is trainable, the base that a companion shares with the
            policy is trained, an optimizer cannot step what is in one or has no rate to schedule, or a schedule waits
            for a metric and its module counts steps.
    """
    counts_steps = not module.automatic_optimization
    check_entries(module, entries, several=counts_steps)
    for name, companion in companions(module).items():
        companion.check_base(name)
    made: list[Any] = []
    for name, part in entries.items():
        optimizer = _make_optimizer(module, name, part)
        make = module.scheduler_for(name)
        if make is None:
            made.append(optimizer)
            continue
        check_rate(optimizer)
        scheduler = make(optimizer)
        found: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if not isinstance(scheduler, ReduceLROnPlateau):
            strict = not module.trainer.fast_dev_run  # type: ignore[attr-defined]
            bind_total_steps(scheduler, module.steps_of(name), strict=strict)
        elif counts_steps:
            raise ValueError(
                f"lr_scheduler={type(scheduler).__name__} waits for a metric, but {type(module).__name__} steps its "
                "schedule after every optimizer step: choose one that counts steps"
            )
        else:
            found = {"scheduler": scheduler, "monitor": getattr(scheduler, "monitor", "train/loss")}
        made.append({"optimizer": optimizer, "lr_scheduler": found})
    if any(isinstance(one, dict) for one in made):  # Lightning takes either form, not both at once
        made = [one if isinstance(one, dict) else {"optimizer": one} for one in made]
    return made if len(made) > 1 else made[0]


def _make_optimizer(module: AlignmentModule, name: str, part: nn.Module) -> Optimizer:
    option = module.optimizer_option(name)
    try:
        optimizer = module.optimizer_for(name)(parameter_groups(part))
    except ValueError as error:
        if not str(error).startswith("Muon only supports 2D"):
            raise
        raise ValueError(f"{option}=torch.optim.Muon takes matrices alone; use MuonWithAdamW ({error})") from error
    set_adapter_rates(part, optimizer)
    check_sharded(optimizer)
    if name == "policy":
        warn_of_small_rate(part, optimizer, module.paradigm)
    fuse(optimizer)
    if isinstance(optimizer, MuonWithAdamW):
        rank_zero_info(f"{option} of the {name}: {optimizer.describe()}")
    return optimizer


def fuse(optimizer: Optimizer) -> None:
    """Has torch's Adam and AdamW read and write each parameter on the CPU once a step, where nothing else is asked for.

    So does the AdamW within `MuonWithAdamW`. Otherwise torch takes about ten passes over memory there; on an
    accelerator its own choice stays. Rounding differs.

    Args:
        optimizer: One whose groups leave `fused` and `foreach` at None; others stay as they are.
    """
    if not isinstance(optimizer, (Adam, MuonWithAdamW)):
        return
    for group in optimizer.param_groups:
        if "fused" not in group:  # Muon's
            continue
        free = group["fused"] is None and group["foreach"] is None
        free = free and not (group["capturable"] or group["differentiable"])
        if free and all(p.device.type == "cpu" and p.is_floating_point() for p in group["params"]):
            group["fused"] = True


def check_sharded(optimizer: Optimizer) -> None:
    """Refuses an optimizer of bitsandbytes for sharded weights, of which its kernels know nothing.

    Raises:
        ValueError: If a parameter is sharded.
    """
    sharded = [p for group in optimizer.param_groups for p in group["params"] if hasattr(p, "full_tensor")]
    if sharded and type(optimizer).__module__.startswith("bitsandbytes."):
        raise ValueError(
            f"optimizer={type(optimizer).__name__} of bitsandbytes is not allowed with sharded weights (a "
            f"{type(sharded[0]).__name__}), which its kernels would read as whole ones: use torch.optim.AdamW, whose "
            "state is sharded with them, or strategy ddp"
        )


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
