"""Learning rates of adapters: a ratio to that of the optimizer, and a warning where one is too small to learn with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from alignment_modules.training.muon import MUON

FULL_RATES = {
    "pretrain": 2e-5,
    "sft": 2e-5,
    "distillation": 2e-5,
    "reward": 1e-5,
    "orpo": 8e-6,
    "online_dpo": 5e-7,
}
"""Learning rates at which all weights of a language model are fine-tuned, by paradigm: those of the recipes."""

OTHER_FULL_RATE = 1e-6
"""That of the others."""


def full_rate(paradigm: str) -> float:
    """A learning rate at which Adam fine-tunes all weights of a language model."""
    return FULL_RATES.get(paradigm, OTHER_FULL_RATE)


def set_adapter_rates(part: nn.Module, optimizer: Optimizer) -> None:
    """Multiplies the learning rate of adapters by the `lr_ratio` that they were made with.

    What is trained whole beside them keeps the optimizer's rate, in a group of its own.

    Args:
        part: What the optimizer moves.
        optimizer: Just made, before any schedule.

    Raises:
        ValueError: The optimizer sets its own rate, or has one for adapters and whole matrices alike.
    """
    ratios = {id(p): ratio for model in part.modules() if (ratio := _ratio(model)) != 1 for p in _adapters(model)}
    for group in list(optimizer.param_groups):
        found = {ratios[id(p)] for p in group["params"] if id(p) in ratios}
        if not found:
            continue
        if group.get("lr") is None:
            raise ValueError(
                f"lora.lr_ratio={found.pop()} multiplies a learning rate, but {type(optimizer).__name__} sets its own "
                "(lr=None): give the optimizer lr, or leave lr_ratio out"
            )
        ratio = found.pop()
        apart = [p for p in group["params"] if ratios.get(id(p)) == ratio]
        others = [p for p in group["params"] if ratios.get(id(p)) != ratio]
        if not others:
            group["lr"] *= ratio
            continue
        if group.get("name") == MUON:
            raise ValueError(
                f"lora.lr_ratio={ratio}: {type(optimizer).__name__} moves whole matrices beside the adapters, at one "
                "rate with them: leave lr_ratio out, or those matrices out of lora.modules_to_save"
            )
        group["params"] = others
        name = f"{group['name']}_adapters" if "name" in group else "adapters"
        optimizer.add_param_group({**group, "params": apart, "lr": group["lr"] * ratio, "name": name})


def warn_of_small_rate(part: nn.Module, optimizer: Optimizer, paradigm: str) -> None:
    """Says so where Adam moves adapters at a rate that is right for all weights: it then hardly learns.

    Args:
        part: What the optimizer moves.
        optimizer: With its peak rates, before any schedule; another than one of Adam's family is not judged.
        paradigm: Which one's usual rate to compare with.
    """
    adapters = {id(p) for p in _adapters(part)}
    if not adapters or "adam" not in type(optimizer).__name__.lower():
        return
    groups = [group for group in optimizer.param_groups if any(id(p) in adapters for p in group["params"])]
    rates = [float(group["lr"]) for group in groups if group.get("lr")]
    usual = full_rate(paradigm)
    if rates and max(rates) <= 2 * usual:
        rank_zero_warn(
            f"the learning rate of the adapters is {max(rates):g}, about that of fine-tuning all weights ({usual:g} "
            f"for {paradigm}). Adapters learn best at about ten times as much: set policy.lora.lr_ratio=10, or the lr "
            f"of the optimizer to {10 * usual:g}"
        )


def check_ratio(then: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuses to resume with another `lr_ratio`: the optimizer goes on at the rates that it was saved with.

    Args:
        then: Hyperparameters of the checkpoint.
        now: Those of this run.
        where: What the checkpoint is called.

    Raises:
        ValueError: If it is another.
    """
    for option in ("policy", "critic"):
        loras = [_option(values.get(option), "lora") for values in (then, now)]
        old, new = (1.0 if (ratio := _option(lora, "lr_ratio")) is None else ratio for lora in loras)
        if None not in loras and old != new:
            raise ValueError(
                f"{option}.lora.lr_ratio={new}, but {where} goes on with its optimizer as it was saved, with {old}: "
                "give that, or start a new run with the exported folder as `policy`"
            )


def _ratio(model: nn.Module) -> float:
    return float(getattr(model, "adapter_lr_ratio", 1))


def _adapters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Trained parameters of LoRA adapters, of modules that are trained whole beside them not one."""
    return (p for name, p in module.named_parameters() if p.requires_grad and ".lora_" in name)


def _option(values: Any, name: str) -> Any:
    return values.get(name) if hasattr(values, "get") else None
