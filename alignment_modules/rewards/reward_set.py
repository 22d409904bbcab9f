"""Several rewards as one: resolves them, gives each what it asks for, and checks what it returns."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from alignment_modules.rewards import verifiers
from alignment_modules.rewards.model import SequenceClassifier
from alignment_modules.rewards.protocol import RewardError, RewardTable

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_BUILT_IN = ("prompts", "completions", "prompt_ids", "completion_ids")


class RewardSet:
    """A weighted sum of rewards, each of which is computed, checked and reported by its own name.

    A reward's name is its `name` attribute if that is text, else the function's or class's; equal names are numbered.

    Args:
        rewards: Each a callable (see `RewardFunction`); or the import path of one, e.g. "my_package.rewards.brevity" (a
            class is instantiated without arguments); or a folder or hub id of a sequence-classification model; or the
            name of one of this package's verifiers.
        weights: One factor per reward; None: all 1.
        option: What errors call `rewards`.

    Raises:
        ValueError: If a reward cannot be found or called, or the weights do not fit the rewards.

    Examples:
        >>> def brevity(completions):
        ...     return [-len(text) for text in completions]
        >>> rewards = RewardSet([brevity, "alignment_modules.rewards.ExactMatch"], weights=[0.5, 10.0])
        >>> table = rewards(prompts=["1+1="], completions=["2", "two"], columns={"answer": ["2"]})
        >>> table.names, table.total.tolist()
        (('brevity', 'exact_match'), [9.5, -1.5])
    """

    def __init__(
        self,
        rewards: Sequence[Callable[..., Any] | str],
        weights: Sequence[float] | None = None,
        option: str = "rewards",
    ) -> None:
        if isinstance(rewards, str) or callable(rewards):
            rewards = [rewards]
        if not rewards:
            raise ValueError("rewards=[] must hold at least one reward")
        self.functions: list[Callable[..., Any]] = [
            _resolve(reward, f"{option}[{row}]") for row, reward in enumerate(rewards)
        ]
        self.names: tuple[str, ...] = _unique_names([_name(function) for function in self.functions])
        weights = [1.0] * len(self.functions) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights={weights} must hold one factor for each of the {len(self.functions)} rewards"
            )
        if not all(math.isfinite(weight) for weight in weights) or not any(weights):
            raise ValueError(f"reward_weights={weights} must be finite and not all 0")
        self.weights: tuple[float, ...] = tuple(weights)
        self._wanted = [_wanted(function, name) for function, name in zip(self.functions, self.names, strict=True)]

    def __len__(self) -> int:
        """The number of rewards."""
        return len(self.functions)

    def to(self, device: torch.device | str) -> RewardSet:
        """Moves reward models to `device`; plain functions are left alone.

        Args:
            device: Where the reward models compute.

        Returns:
            This object.
        """
        for function in self.functions:
            if isinstance(function, torch.nn.Module | SequenceClassifier):
                function.to(device)
        return self

    def __call__(
        self,
        *,
        completions: Sequence[str],
        prompts: Sequence[Any] | None = None,
        prompt_ids: Sequence[Any] | None = None,
        completion_ids: Sequence[Any] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> RewardTable:
        """Judges N completions of P prompts; N is a multiple of P and a prompt's completions are neighbours.

        Args:
            completions: N texts.
            prompts: P (or N) prompts.
            prompt_ids: P (or N) lists of token ids, without padding.
            completion_ids: N lists of token ids, without padding.
            columns: The data set's other columns, each of P (or N) entries.

        Returns:
            The table of all rewards.

        Raises:
            RewardError: If a reward raises, asks for what is not there, or returns anything but N finite numbers (None
                and NaN mean "not applicable"), or if no reward applies to a row.
        """
        count = len(completions)
        given: dict[str, Any] = dict(columns or {})
        own = {
            "prompts": prompts,
            "completions": completions,
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
        }
        given.update({name: value for name, value in own.items() if value is not None})
        prompt_count = count if prompts is None else len(prompts)
        rows = _Rows(given, count, prompt_count)
        values = torch.full((count, len(self.functions)), math.nan, dtype=torch.float64)
        for column, (function, name, wanted) in enumerate(zip(self.functions, self.names, self._wanted, strict=True)):
            arguments = rows.arguments(name, wanted)
            values[:, column] = torch.tensor(_compute(function, name, arguments, count), dtype=torch.float64)
        applicable = ~values.isnan()
        if count and not bool(applicable.any(1).all()):
            row = int((~applicable.any(1)).nonzero()[0])
            raise RewardError(
                f"no reward applies to row {row}: {', '.join(self.names)} all gave None or NaN for "
                f"completion {_short(completions[row])}"
            )
        weights = torch.tensor(self.weights, dtype=torch.float64)
        total = (values.nan_to_num(nan=0.0) * weights).sum(1)
        return RewardTable(self.names, values.float(), total.float())


class _Wanted:
    """The parameters that a reward accepts."""

    def __init__(self, required: list[str], optional: list[str], everything: bool) -> None:
        self.required, self.optional, self.everything = required, optional, everything


class _Rows:
    """What is there to give, repeated to one entry per completion on first use."""

    def __init__(self, given: dict[str, Any], count: int, prompt_count: int) -> None:
        self.given, self.count, self.prompt_count = given, count, prompt_count
        self._repeated: dict[str, list[Any]] = {}
        if prompt_count and count % prompt_count:
            raise RewardError(f"{count} completions are not a multiple of {prompt_count} prompts")

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._repeated:
            value = self.given[name]
            length = len(value) if hasattr(value, "__len__") and not isinstance(value, str | bytes | dict) else -1
            if length == self.count:
                self._repeated[name] = list(value)
            elif length == self.prompt_count and name not in ("completions", "completion_ids"):
                repeats = self.count // self.prompt_count
                self._repeated[name] = [entry for entry in value for _ in range(repeats)]
            else:
                found = f"{length} entries" if length >= 0 else type(value).__name__
                raise RewardError(
                    f"column {name!r} ({found}) must be a list with one entry per prompt ({self.prompt_count}) "
                    f"or per completion ({self.count})"
                )
        return self._repeated[name]

    def arguments(self, reward: str, wanted: _Wanted) -> dict[str, list[Any]]:
        missing = [name for name in wanted.required if name not in self.given]
        if missing:
            raise RewardError(
                f"reward {reward!r} asks for {', '.join(map(repr, missing))}, which is not there; "
                f"found: {', '.join(sorted(self.given))}"
            )
        names = list(self.given) if wanted.everything else wanted.required + wanted.optional
        return {name: self[name] for name in names if name in self.given}


def _resolve(reward: Any, place: str) -> Callable[..., Any]:
    label = f"{place}={reward!r}"
    if isinstance(reward, str):
        if Path(reward).expanduser().is_dir():
            return SequenceClassifier(reward)
        if getattr(verifier := getattr(verifiers, reward, None), "__module__", "") == verifiers.__name__:
            reward = verifier
        elif _IMPORT_PATH.fullmatch(reward):
            reward = _import(reward, label)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", reward):
            return SequenceClassifier(reward)
        else:
            raise ValueError(
                f"{label} is neither a folder, a hub id, nor an import path such as 'package.module.name', nor the "
                "name of a verifier of this library"
            )
    if inspect.isclass(reward):
        try:
            reward = reward()
        except TypeError as error:
            raise ValueError(f"{label} is a class that needs arguments; give an instance: {error}") from error
    if not callable(reward):
        raise ValueError(f"{label} must be callable, an import path, or the path of a reward model")
    return reward


def _import(path: str, label: str) -> Any:
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # a module that is there but imports something that is not must not be reported as missing itself
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise ValueError(
            f"{label}: no module named {error.name!r} and no folder of that name; a file of your own must "
            "lie on Python's path (PYTHONPATH, or an installed package)"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"{label}: module {module_name!r} has no attribute {attribute!r}")
    return getattr(module, attribute)


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    own = getattr(function, "name", None)
    if isinstance(own, str) and own:
        return own
    return str(getattr(function, "__name__", type(function).__name__)).strip("<>")


def _unique_names(names: list[str]) -> tuple[str, ...]:
    unique: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in unique:
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return tuple(unique)


def _wanted(function: Any, name: str) -> _Wanted:
    target = function.forward if isinstance(function, torch.nn.Module) else function
    bound = target.keywords if isinstance(target, functools.partial) else {}
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {name!r} ({function!r}) has no readable signature; wrap it in a function") from error
    required: list[str] = []
    optional: list[str] = []
    everything = False
    for parameter in (parameter for parameter in parameters if parameter.name not in bound):
        if parameter.kind is parameter.VAR_KEYWORD:
            everything = True
        elif parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise ValueError(f"reward {name!r} takes {parameter.name!r} by position only; it must accept keywords")
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            (required if parameter.default is parameter.empty else optional).append(parameter.name)
    if not (required or optional or everything):
        raise ValueError(f"reward {name!r} takes no argument; it must ask for at least one of {', '.join(_BUILT_IN)}")
    return _Wanted(required, optional, everything)


def _compute(function: Callable[..., Any], name: str, arguments: dict[str, list[Any]], count: int) -> list[float]:
    if not count:
        return []
    try:
        # a copy of each list, so that a reward that edits its arguments cannot change another's
        result = function(**{key: list(value) for key, value in arguments.items()})
    except RewardError as error:
        raise RewardError(f"reward {name!r}: {error}") from error
    except Exception as error:
        _blame_row(function, name, arguments, count, error)
    if isinstance(result, torch.Tensor):
        result = result.detach().cpu().tolist()
    elif hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, Sequence) or isinstance(result, str | bytes):
        raise RewardError(
            f"reward {name!r} returned {type(result).__name__} {_short(result)}; "
            f"it must return a list of {count} numbers"
        )
    if len(result) != count:
        raise RewardError(f"reward {name!r} returned {len(result)} values for {count} completions")
    return [_number(value, name, row) for row, value in enumerate(result)]


def _number(value: Any, name: str, row: int) -> float:
    if value is None:
        return math.nan
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    if not isinstance(value, Real):
        raise RewardError(
            f"reward {name!r} returned {type(value).__name__} {_short(value)} in row {row}; "
            "it must be a number, or None where the reward does not apply"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isnan(number) and not abs(number) <= torch.finfo(torch.float32).max:
        raise RewardError(f"reward {name!r} returned {_short(value)} in row {row}; it must be finite (float32)")
    return number


def _blame_row(
    function: Callable[..., Any], name: str, arguments: dict[str, list[Any]], count: int, error: Exception
) -> NoReturn:
    """Finds the row by judging each alone; this costs time only on the way to an error."""
    what = f"{type(error).__name__}: {error}"
    for row in range(count):
        try:
            function(**{key: value[row : row + 1] for key, value in arguments.items()})
        except Exception:
            shown = f" (completion {_short(arguments['completions'][row])})" if "completions" in arguments else ""
            raise RewardError(f"reward {name!r} raised in row {row}{shown}: {what}") from error
    raise RewardError(f"reward {name!r} raised on {count} rows, though on none of them alone: {what}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
