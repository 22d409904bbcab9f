"""What is trained on what: a file a paradigm, none importing another (but pretraining SFT), and the table of them."""

from typing import Any

from alignment_modules.paradigms.cpo import CPOModule
from alignment_modules.paradigms.distillation import DistillationModule
from alignment_modules.paradigms.dpo import DPOModule
from alignment_modules.paradigms.grpo import GRPOModule
from alignment_modules.paradigms.kto import KTOModule
from alignment_modules.paradigms.online_dpo import OnlineDPOModule
from alignment_modules.paradigms.orpo import ORPOModule
from alignment_modules.paradigms.ppo import PPOModule
from alignment_modules.paradigms.pretrain import PretrainModule
from alignment_modules.paradigms.reward import RewardModule
from alignment_modules.paradigms.sft import SFTModule
from alignment_modules.training.module import AlignmentModule

__all__ = [
    "PARADIGMS",
    "CPOModule",
    "DPOModule",
    "DistillationModule",
    "GRPOModule",
    "KTOModule",
    "ORPOModule",
    "OnlineDPOModule",
    "PPOModule",
    "PretrainModule",
    "RewardModule",
    "SFTModule",
    "create_module",
    "get_module_class",
]

PARADIGMS: tuple[type[AlignmentModule], ...] = (
    PretrainModule,
    SFTModule,
    RewardModule,
    DPOModule,
    ORPOModule,
    CPOModule,
    KTOModule,
    DistillationModule,
    OnlineDPOModule,
    GRPOModule,
    PPOModule,
)
"""The modules of all paradigms, in the order in which they are listed."""

_MODULES = {module.paradigm: module for module in PARADIGMS}


def get_module_class(name: str) -> type[AlignmentModule]:
    """The module of a paradigm.

    Args:
        name: One of the table, such as "sft", "dpo" or "grpo".

    Raises:
        ValueError: If there is no such paradigm.

    Example:
        >>> get_module_class("dpo").__name__
        'DPOModule'
    """
    if name not in _MODULES:
        raise ValueError(f"name={name!r} is not a paradigm; allowed: {', '.join(_MODULES)}")
    return _MODULES[name]


def create_module(name: str, **keywords: Any) -> AlignmentModule:
    """Builds the module of a paradigm: `create_module("dpo", policy="runs/sft/export", beta=0.1)`."""
    return get_module_class(name)(**keywords)
