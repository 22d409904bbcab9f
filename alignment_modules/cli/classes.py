"""The classes that the command line knows: which there are, which are only bases, and what options they have."""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import Any

import docstring_parser
import torch
import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from alignment_modules import callbacks, rewards
from alignment_modules.callbacks.logged_metrics import LoggedMetrics
from alignment_modules.evaluation import EvaluationConfig
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.lora import LoraConfig
from alignment_modules.rollouts import engines
from alignment_modules.training.acting import ActingModule
from alignment_modules.training.actor_critic import ActorCriticModule
from alignment_modules.training.engines import EngineModule
from alignment_modules.training.episodes import EpisodeModule
from alignment_modules.training.groups import GroupModule
from alignment_modules.training.module import AlignmentModule
from alignment_modules.training.policy_gradient import PolicyGradientModule
from alignment_modules.training.schedules import Schedule
from alignment_modules.training.updates import UpdateModule
from datamodules import AlignmentDataModule, CacheOptions, MixtureSource, StreamOptions, curricula, tasks

BASES = (
    *(AlignmentModule, UpdateModule, EngineModule, EpisodeModule, ActingModule),
    *(PolicyGradientModule, GroupModule, ActorCriticModule),
    *(AlignmentDataModule, Schedule, LoggedMetrics, curricula.Curriculum),
)
"""Classes that only others are made of; the command line refuses them by name."""

CLASSES_ONLY = {
    "model": AlignmentModule,
    "data": LightningDataModule,
    "curriculum": curricula.Curriculum,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
    "critic_optimizer": Optimizer,
    "critic_lr_scheduler": LRScheduler,
    "callbacks": Callback,
}
"""Options that take the name of a class derived from this one, and no other text."""

OURS = ("alignment_modules", "datamodules")


def public_classes(package: types.ModuleType, base: type | None = None) -> list[type]:
    """The classes in a package's `__all__`, without errors and what is not derived from `base`."""
    found = [getattr(package, name) for name in package.__all__]
    return [c for c in found if inspect.isclass(c) and issubclass(c, base or object) and not issubclass(c, Exception)]


_NO_REWARDS = (rewards.RewardSet, rewards.RewardFunction)
REWARDS = [c for c in public_classes(rewards) if "__call__" in vars(c) and c not in _NO_REWARDS]
_BASES_OF_TASKS = (tasks.AdditionTask, tasks.HiddenNumberTask)
TASKS = [c for c in public_classes(tasks, Dataset) if c not in _BASES_OF_TASKS]
CURRICULA = public_classes(curricula, curricula.Curriculum)
CALLBACKS = public_classes(callbacks, Callback)

_LISTS: dict[str, tuple[str, Callable[[], list[type]]]] = {
    "model": ("modules", lambda: subclasses([AlignmentModule])),
    "data": ("data modules", lambda: subclasses([LightningDataModule])),
    "rewards": ("rewards", lambda: REWARDS),
    "verifier": ("rewards", lambda: REWARDS),
    "optimizer": ("optimizers", lambda: subclasses([Optimizer])),
    "lr_scheduler": ("schedules", lambda: subclasses([LRScheduler])),
    "critic_optimizer": ("optimizers", lambda: subclasses([Optimizer])),
    "critic_lr_scheduler": ("schedules", lambda: subclasses([LRScheduler])),
    "callbacks": ("callbacks", lambda: [*CALLBACKS, *(c for c in subclasses([Callback]) if c not in CALLBACKS)]),
    "policy": ("policy", lambda: [PolicyConfig]),
    "reference": ("policy", lambda: [PolicyConfig]),
    "teacher": ("policy", lambda: [PolicyConfig]),
    "critic": ("policy", lambda: [PolicyConfig]),
    "lora": ("adapters", lambda: [LoraConfig]),
    "evaluation": ("evaluation", lambda: [EvaluationConfig]),
    "cache": ("tables on disk", lambda: [CacheOptions]),
    "stream": ("streams", lambda: [StreamOptions]),
    "engine": ("engines", lambda: [engines.VLLMEngine]),
    "sources": ("sources", lambda: [MixtureSource]),
    "curriculum": ("curricula", lambda: CURRICULA),
    **dict.fromkeys(("train", "validation", "test", "predict"), ("tasks", lambda: TASKS)),
}
"""What stands behind an option, by the last part of its name."""


def choices(option: str) -> list[type]:
    """The classes that an option such as "model.lr_scheduler" takes, this project's first; [] where it takes none."""
    name = last(option)
    if name not in _LISTS:
        return []
    found = _LISTS[name][1]()
    return sorted(found, key=lambda c: c.__module__.partition(".")[0] not in OURS)


def subclasses(bases: Iterable[type]) -> list[type]:
    """All known subclasses that have a public name and are more than bases of others."""
    found: dict[type, None] = {}
    waiting: list[type] = []
    for base in bases:
        waiting.extend(() if base.__name__ == "Module" else base.__subclasses__())
    while waiting:
        current = waiting.pop(0)
        if current not in found:
            found[current] = None
            waiting.extend(current.__subclasses__())
    return [
        c
        for c in found
        if not (c.__name__.startswith("_") or inspect.isabstract(c) or c in BASES or ".cli" in c.__module__)
    ]


def path_of(cls: type) -> str:
    """Import path of a class."""
    return f"{cls.__module__}.{cls.__name__}"


def bases_of(typehint: Any) -> set[type]:
    """The classes in a type; of a callable, those in what it returns."""
    if inspect.isclass(typehint) and typing.get_origin(typehint) is None:
        return set() if typehint.__module__ in ("builtins", "collections.abc") else {typehint} - {torch.Tensor}
    arguments = typing.get_args(typehint)
    if typing.get_origin(typehint) not in (typing.Union, types.UnionType, list):
        arguments = arguments[-1:]
    return set().union(*(bases_of(argument) for argument in arguments if argument is not typehint))


def takes_classes(option: str, typehint: Any) -> bool:
    """Whether an option takes the classes of `choices`: its type has a class, or anything that can be called."""
    return bool(choices(option)) and (bool(bases_of(typehint)) or _takes_callables(typehint))


def _takes_callables(typehint: Any) -> bool:
    called = Callable in (typehint, typing.get_origin(typehint))
    return called or any(map(_takes_callables, typing.get_args(typehint)))


def import_path(path: str) -> Any:
    """What an import path names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def option_names(owner: Any) -> list[str]:
    """Names of the options of a class; an optimizer's parameters, which come later, are none."""
    if not inspect.isclass(owner):
        return list(inspect.signature(owner).parameters)
    return ArgumentParser(exit_on_error=False).add_class_arguments(
        owner, fail_untyped=False, skip={1} if _comes_later(owner) else None
    )


def _comes_later(owner: type) -> bool:
    return next(iter(inspect.signature(owner).parameters), "") in ("params", "optimizer")


def options_of(cls: type) -> list[tuple[type, inspect.Parameter, Any, str]]:
    """The options of a class and of those that its `**keywords` go to.

    Args:
        cls: A class whose options are the parameters of its constructor.

    Returns:
        For each the class that declares it, its parameter, its type and its description in the docstring.
    """
    result: list[tuple[type, inspect.Parameter, Any, str]] = []
    seen = {"self", "params", "optimizer"} if _comes_later(cls) else {"self"}
    for level in cls.__mro__:
        if "__init__" not in vars(level):
            continue
        hints = typing.get_type_hints(level if is_dataclass(level) else level.__init__, include_extras=True)  # type: ignore[misc]
        told = [p for c in (level, cls) for p in docstring_parser.parse(inspect.getdoc(c) or "").params]
        words = {p.arg_name: " ".join((p.description or "").split()) for p in told}
        parameters = list(inspect.signature(level.__init__).parameters.values())  # type: ignore[misc]
        for parameter in parameters:
            if parameter.name not in seen and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                seen.add(parameter.name)
                hint = hints.get(parameter.name, parameter.annotation)
                result.append((level, parameter, hint, words.get(parameter.name, "")))
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return result


def last(path: str) -> str:
    """What follows the last dot."""
    return path.rpartition(".")[2]


def know_short_names() -> None:
    """Lets `class_path: ExactMatch` name a class of this project in any configuration that is read from now on.

    jsonargparse finds a class by its name where the option's type is its base, as for modules, schedules and callbacks.
    Rewards, tasks and engines have none; and of the two `ReduceLROnPlateau` Lightning's knows what to monitor.
    """
    load = get_loader("yaml")
    short = {
        c.__name__: f"{package.__name__}.{c.__name__}"
        for package in (rewards, tasks, engines)
        for c in public_classes(package)
    }

    def load_short(text: Any) -> Any:
        return _lengthen(load(text), short)

    if getattr(load, "__name__", "") != load_short.__name__:
        set_loader("yaml", load_short, (yaml.YAMLError,))


def lengthen_argument(argument: str) -> str:
    """The same for `--model.lr_scheduler ReduceLROnPlateau`, which is not read as YAML."""
    option, sign, value = argument.rpartition("=")
    return option + sign + _lengthen(value, {})


def _lengthen(tree: Any, short: dict[str, str]) -> Any:
    if isinstance(tree, list):
        return [_lengthen(branch, short) for branch in tree]
    if not isinstance(tree, dict):
        return path_of(ReduceLROnPlateau) if tree == ReduceLROnPlateau.__name__ else tree
    tree = {key: _lengthen(branch, short) for key, branch in tree.items()}
    if isinstance(name := tree.get("class_path"), str):
        tree["class_path"] = short.get(name, name)
    return tree
