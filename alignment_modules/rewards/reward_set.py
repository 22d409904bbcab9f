"""Several rewards as one: resolves them, gives each what it asks for, and checks what it returns."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from alignment_modules.functional.import_path import import_object, is_import_path
from alignment_modules.functional.waiting import tell
from alignment_modules.policies.sharded import gathered
from alignment_modules.rewards import verifiers
from alignment_modules.rewards.calling import compute
from alignment_modules.rewards.judged_rows import judged_rows
from alignment_modules.rewards.model import SequenceClassifier
from alignment_modules.rewards.protocol import RewardError, RewardTable

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
        for function in map(_inner, self.functions):
            if isinstance(function, torch.nn.Module | SequenceClassifier):
                function.to(device)
        return self

    def shard(self, mesh: DeviceMesh) -> RewardSet:
        """Keeps the weights of sequence classifiers in shards; all processes must then judge as often.

        Args:
            mesh: One dimension, the processes that share the weights.

        Returns:
            This object.
        """
        for function in map(_inner, self.functions):
            if isinstance(function, SequenceClassifier):
                function.shard(mesh)
        return self

    def limit_to(self, max_completion_length: int) -> RewardSet:
        """Tells rewards that have a method `limit_to` how long completions may get.

        Args:
            max_completion_length: In tokens.

        Returns:
            This object.
        """
        for function in map(_inner, self.functions):
            if callable(limit_to := getattr(function, "limit_to", None)):
                limit_to(max_completion_length)
        return self

    def wanted(self) -> dict[str, tuple[str, ...]]:
        """What each reward asks for by parameter name, what it can do without in brackets; "*": whatever there is."""
        return {
            name: (*wanted.required, *(f"[{column}]" for column in wanted.optional), *(["*"] * wanted.everything))
            for name, wanted in zip(self.names, self._wanted, strict=True)
        }

    def check_columns(self, columns: Collection[str]) -> None:
        """Checks, before anything is generated, that the data has what the rewards ask for.

        Args:
            columns: The names of the data set's columns.

        Raises:
            RewardError: If a column is missing; it names the reward, the column and the columns there are.
        """
        for name, wanted in zip(self.names, self._wanted, strict=True):
            wanted.check(name, {*columns, *_BUILT_IN})

    def __call__(
        self,
        *,
        completions: Sequence[str],
        prompts: Sequence[Any] | None = None,
        prompt_ids: Sequence[Any] | None = None,
        completion_ids: Sequence[Any] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        judges: Sequence[Sequence[str] | None] | None = None,
    ) -> RewardTable:
        """Judges N completions of P prompts; N is a multiple of P and a prompt's completions are neighbours.

        Args:
            completions: N texts.
            prompts: P (or N) prompts.
            prompt_ids: P (or N) lists of token ids, without padding.
            completion_ids: N lists of token ids, without padding.
            columns: The data set's other columns, each of P (or N) entries.
            judges: Of P (or N) prompts the names of the rewards that judge them, None: all. A reward sees the
                completions that it judges and no others, and adds nothing to the others' total. None: all judge all.

        Returns:
            The table of all rewards.

        Raises:
            RewardError: If a reward raises, asks for what is not there, or returns anything but N finite numbers (None
                and NaN mean "not applicable").
            ValueError: If `judges` names what is no reward.
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
        rows, asked = _Rows(given, count, prompt_count), judged_rows(self.names, judges, count)
        values = torch.full((count, len(self.functions)), math.nan, dtype=torch.float64)
        for column, (function, name, wanted) in enumerate(zip(self.functions, self.names, self._wanted, strict=True)):
            arguments, inner = rows.arguments(name, wanted), _inner(function)
            judged = range(count) if asked is None else asked[:, column].nonzero().flatten().tolist()
            if len(judged) < count:
                arguments = {key: [entries[row] for row in judged] for key, entries in arguments.items()}
            tell(f"judging: {name}")
            # Others may have no completion, or call their reward again: from here on nobody waits for anybody.
            with gathered(inner.model) if isinstance(inner, SequenceClassifier) else nullcontext():
                found = compute(function, name, arguments, len(judged))
                values[list(judged), column] = torch.tensor(found, dtype=torch.float64)
        return replace(self.table(values), asked=asked)

    def table(self, values: torch.Tensor) -> RewardTable:
        """The table of rewards that are known, each by itself.

        Args:
            values: `[N, F]`; NaN: not applicable.

        Raises:
            ValueError: If there is another number of them.
        """
        if values.shape[1:] != (len(self),):
            raise ValueError(
                f"rewards has shape {tuple(values.shape)}: with one column a reward it must have {len(self)}, for "
                f"{', '.join(self.names)}"
            )
        weights = torch.tensor(self.weights, dtype=torch.float64)
        total = (values.double().nan_to_num(nan=0.0) * weights).sum(1)
        total = total.masked_fill(values.isnan().all(1), math.nan)
        return RewardTable(self.names, values.float(), total.float())


class _Wanted:
    """The parameters that a reward accepts."""

    def __init__(self, required: list[str], optional: list[str], everything: bool) -> None:
        self.required, self.optional, self.everything = required, optional, everything

    def check(self, reward: str, given: Collection[str]) -> None:
        missing = [name for name in self.required if name not in given]
        if missing:
            raise RewardError(
                f"reward {reward!r} asks for {', '.join(map(repr, missing))}, which is not there; "
                f"found: {', '.join(sorted(given))}"
            )


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
        wanted.check(reward, self.given)
        names = list(self.given) if wanted.everything else wanted.required + wanted.optional
        return {name: self[name] for name in names if name in self.given}


def _resolve(reward: Any, place: str) -> Callable[..., Any]:
    label = f"{place}={reward!r}"
    if isinstance(reward, str):
        if Path(reward).expanduser().is_dir():
            return SequenceClassifier(reward)
        if getattr(verifier := getattr(verifiers, reward, None), "__module__", "") == verifiers.__name__:
            reward = verifier
        elif is_import_path(reward):
            reward = import_object(reward, label, " and no folder of that name")
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", reward):
            return SequenceClassifier(reward)
        else:
            classes = [item for item in vars(verifiers).values() if inspect.isclass(item)]
            known = ", ".join(item.__name__ for item in classes if item.__module__ == verifiers.__name__)
            raise ValueError(
                f"{label} is neither a folder, a hub id, nor an import path such as 'package.module.name', nor the "
                f"name of a verifier of this library: {known}"
            )
    if inspect.isclass(reward):
        try:
            reward = reward()
        except TypeError as error:
            raise ValueError(f"{label} is a class that needs arguments; give an instance: {error}") from error
    if not callable(reward):
        raise ValueError(f"{label} must be callable, an import path, or the path of a reward model")
    return reward


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


def _inner(function: Any) -> Any:
    """What a decorator or a `PatientReward` holds, as far as its signature is that of what it holds."""
    return inspect.unwrap(function, stop=lambda outer: hasattr(outer, "__signature__"))


def _wanted(function: Any, name: str) -> _Wanted:
    function = _inner(function)
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
    required += [column for column in getattr(function, "required_columns", ()) if column not in required]
    return _Wanted(required, optional, everything)
