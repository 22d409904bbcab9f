"""The environments and tools of a run: found, checked before anything is generated, and chosen by row."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment_modules.functional.http import short
from alignment_modules.functional.import_path import import_object, is_import_path
from alignment_modules.rollouts.environments.schemas import Tool, methods_of, tool_of

_Given = str | Callable[..., Any] | dict[str, str | dict[str, Any] | None]
Environments = _Given | dict[str, _Given]
"""One environment for all rows, or several by name: factories, import paths, or `class_path` with `init_args`."""
Tools = _Given | list[_Given]
"""Tools without state: functions, import paths, or `class_path` of objects whose methods they are."""

_COLUMNS = ("environment", "source_name")


class EnvironmentSet:
    """What a policy can act on.

    Args:
        environments: A factory (anything that returns a new environment when called without arguments, such as a
            class), its import path, or `{"class_path": ..., "init_args": {...}}`; or several by name, of which a row's
            column `environment`, or else its source in a mixture, chooses one. None: there are tools alone.
        tools: Functions without state that every row has, or their import paths; or objects, whose public methods then
            are tools.
        in_process: False: tools run in other processes, and must therefore be functions given by import path.

    Raises:
        ValueError: If one cannot be found or made, lacks what the loop or a chat template needs, or two tools of one
            environment have one name; it names the option, the method and what is missing.

    Examples:
        >>> class Hidden:
        ...     def reset(self, number: int) -> None:
        ...         self.number = number
        ...     def is_above(self, guess: int) -> bool:
        ...         '''Tells whether the number is above a guess.
        ...
        ...         Args:
        ...             guess: The guess.
        ...         '''
        ...         return self.number > guess
        >>> found = EnvironmentSet(Hidden)
        >>> found.names, [schema["function"]["name"] for schema in found.schemas("Hidden")]
        (('Hidden',), ['is_above'])
        >>> found.reset_arguments(found.make("Hidden"), {"number": 3, "answer": "3"}, seed=0)
        {'number': 3}
    """

    def __init__(
        self,
        environments: Environments | None = None,
        tools: Tools | Sequence[Any] | None = None,
        *,
        in_process: bool = True,
    ) -> None:
        if environments is None and tools is None:
            raise ValueError("environments=None and tools=None: one of them must be given")
        if not in_process and tools is None:
            raise ValueError(
                "tool_options.in_process=False without tools has no effect: environments keep their state here"
            )
        self._tools = _tools_of(tools, in_process)
        self._by_row = isinstance(environments, Mapping) and "class_path" not in environments
        self._factories = _factories_of(environments)
        self._entries = {name: self._look_at(name, factory) for name, factory in self._factories.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The environments; empty where there are tools alone."""
        return tuple(self._factories)

    def for_row(self, row: Mapping[str, Any]) -> str | None:
        """The name of a row's environment.

        Args:
            row: Its columns.

        Returns:
            The name; None where there are tools alone.

        Raises:
            ValueError: If the row names none of the environments.
        """
        if not self._by_row:
            return next(iter(self.names), None)
        for column in _COLUMNS:
            if row.get(column) is not None:
                if row[column] in self.names:
                    return str(row[column])
                if column == _COLUMNS[0] or len(self.names) > 1:
                    raise ValueError(f"{column}={short(row[column])} must be one of {', '.join(map(repr, self.names))}")
        if len(self.names) == 1:
            return self.names[0]
        raise ValueError(
            f"a row must name its environment in the column 'environment', or be of a mixture's source of that name: "
            f"{', '.join(map(repr, self.names))}; its columns: {', '.join(sorted(row)) or 'none'}"
        )

    def make(self, name: str) -> Any:
        """A new environment; whatever its factory raises is raised.

        Raises:
            ValueError: If the factory returned something without `reset`.
        """
        environment = self._factories[name]()
        _check_reset(environment, f"environment {name!r}")
        return environment

    def tools_of(self, name: str | None, environment: Any = None) -> dict[str, Tool]:
        """The tools of an episode: those of its environment, bound to it, and those without state.

        Args:
            name: As `for_row` tells; None: there are tools alone.
            environment: As `make` made it.

        Returns:
            The tools by name.
        """
        if name is None:
            return dict(self._tools)
        own = {
            tool.name: Tool(tool.name, tool.schema, getattr(environment, tool.name), owner=environment)
            for tool in self._entries[name].tools
        }
        return own | self._tools

    def schemas(self, name: str | None) -> list[dict[str, Any]]:
        """The schemas of an environment's tools, for the keyword `tools` of a chat template."""
        own = [] if name is None else [tool.schema for tool in self._entries[name].tools]
        return own + [tool.schema for tool in self._tools.values()]

    def rewards(self, name: str | None) -> dict[str, bool]:
        """Whether the environments of a name have a `reward` (`get_reward`) and `turn_rewards`."""
        entry = None if name is None else self._entries[name]
        return {
            "reward": entry is not None and entry.judges,
            "turn_rewards": entry is not None and entry.judges_turns,
        }

    @property
    def judges(self) -> bool:
        """Whether an environment has rewards of either kind."""
        return any(any(self.rewards(name).values()) for name in self.names)

    @property
    def judges_turns(self) -> bool:
        """Whether an environment has `turn_rewards`."""
        return any(self.rewards(name)["turn_rewards"] for name in self.names)

    def reset_arguments(self, environment: Any, row: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """What of a row the `reset` of an environment asks for.

        Args:
            environment: As `make` made it.
            row: The columns of the row.
            seed: What a parameter `seed` gets, unless the row has such a column.

        Returns:
            Keywords of `reset`.

        Raises:
            ValueError: If it asks for a column that the row lacks.
        """
        wanted = _reset_wants(environment.reset)
        given = {"seed": seed, **row} if "seed" in wanted.names else dict(row)
        if missing := [one for one in wanted.required if one not in given]:
            raise ValueError(
                f"reset of {type(environment).__name__} asks for {', '.join(map(repr, missing))}, which is not there; "
                f"columns: {', '.join(sorted(row)) or 'none'}"
            )
        return given if wanted.everything else {one: given[one] for one in wanted.names if one in given}

    def check_columns(self, columns: Collection[str]) -> None:
        """Checks, before anything is generated, that the data has what choosing and `reset` need.

        Args:
            columns: The names of the data set's columns.

        Raises:
            ValueError: If a column is missing; it names the environment, the column and the columns there are.
        """
        told = f"columns: {', '.join(sorted(columns)) or 'none'}"
        if len(self.names) > 1 and not set(_COLUMNS) & set(columns):
            raise ValueError(f"the environments {', '.join(self.names)} need the column 'environment'; {told}")
        if len(self.names) > 1:
            return  # a source's rows have its own environment's columns
        for name, entry in self._entries.items():
            if missing := [one for one in entry.reset.required if one not in {*columns, "seed"}]:
                asked = ", ".join(map(repr, missing))
                raise ValueError(f"reset of environment {name!r} asks for {asked}, which is not there; {told}")

    def _look_at(self, name: str, factory: Callable[[], Any]) -> _Entry:
        """Makes two environments, and tells what all of them have."""
        place = f"environments[{name!r}]" if self._by_row else f"environments={name}"
        made = []
        try:
            made = [factory(), factory()]
        except Exception as error:
            raise ValueError(f"{place} could not be made: {type(error).__name__}: {error}") from error
        if made[0] is made[1]:
            raise ValueError(f"{place} returns the same object twice; every episode needs an environment of its own")
        wanted = _check_reset(made[0], place)
        methods = {name: getattr(made[0], name, None) for name in ("get_reward", "turn_rewards")}
        for method, found in methods.items():
            if found is not None:
                _check_plain(found, f"{place}.{method}")
        tools = methods_of(made[0], place, owner=made[0])
        for tool in tools:
            if tool.name in self._tools:
                raise ValueError(f"{place}.{tool.name} and tools are of one name: {tool.name!r}")
        for environment in made:
            _close(environment, place)
        judges, judges_turns = (found is not None for found in methods.values())
        return _Entry(tuple(tools), wanted, judges, judges_turns)


@dataclass(frozen=True)
class _Wanted:
    """The parameters of a `reset`."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    everything: bool


@dataclass(frozen=True)
class _Entry:
    """What all environments of one name have."""

    tools: tuple[Tool, ...]
    reset: _Wanted
    judges: bool
    judges_turns: bool


def _reset_wants(reset: Callable[..., Any]) -> _Wanted:
    parameters = inspect.signature(reset).parameters.values()
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return _Wanted(
        tuple(one.name for one in named),
        tuple(one.name for one in named if one.default is one.empty),
        any(one.kind is one.VAR_KEYWORD for one in parameters),
    )


def _check_reset(environment: Any, place: str) -> _Wanted:
    reset = getattr(environment, "reset", None)
    if not callable(reset):
        raise ValueError(f"{place} ({type(environment).__name__}) has no method reset(**row), which begins an episode")
    try:
        for one in inspect.signature(reset).parameters.values():
            if one.kind is one.POSITIONAL_ONLY and one.default is one.empty:
                raise ValueError(f"{place}: reset takes {one.name!r} by position only; columns are given by name")
    except TypeError as error:
        raise ValueError(f"{place}: the signature of reset cannot be read: {error}") from error
    return _reset_wants(reset)


def _close(environment: Any, place: str) -> None:
    """Closes an environment that did not begin an episode."""
    try:
        if callable(close := getattr(environment, "close", None)):
            close()
    except Exception as error:
        raise ValueError(f"{place}.close failed before any reset: {type(error).__name__}: {error}") from error


def _check_plain(method: Any, place: str) -> None:
    """A method that the loop calls without arguments."""
    if not callable(method):
        raise ValueError(f"{place} is no method")
    try:
        inspect.signature(method).bind()
    except TypeError as error:
        raise ValueError(f"{place} must do without arguments: {error}") from error


def _factories_of(environments: Environments | None) -> dict[str, Callable[[], Any]]:
    if environments is None:
        return {}
    if not isinstance(environments, Mapping) or "class_path" in environments:
        factory, name = _factory(environments, "environments")
        return {name: factory}
    if not environments:
        raise ValueError("environments={} must name at least one environment")
    for name in environments:
        if not isinstance(name, str) or not name:
            raise ValueError(f"environments: the name {name!r} must be a text")
    return {name: _factory(one, f"environments[{name!r}]")[0] for name, one in environments.items()}


def _factory(given: Any, option: str) -> tuple[Callable[[], Any], str]:
    """What makes an environment, and what it is called."""
    label = f"{option}={given!r}"
    arguments: dict[str, Any] = {}
    if isinstance(given, Mapping):
        given, arguments = _class_path(given, label)
    if isinstance(given, str):
        if not is_import_path(given):
            raise ValueError(f"{label} must be an import path, such as 'package.module.name'")
        given = import_object(given, label)
    if not callable(given):
        more = ": give its class, or a function that makes one" if hasattr(given, "reset") else ""
        raise ValueError(f"{label} must be a factory of environments{more}")
    try:
        inspect.signature(given).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{label} cannot be called so: {error}") from error
    except ValueError:  # a class of C's has no signature: calling it tells
        pass
    name = getattr(given, "__name__", type(given).__name__)
    return (functools.partial(given, **arguments) if arguments else given), name


def _class_path(given: Mapping[str, Any], label: str) -> tuple[str, dict[str, Any]]:
    extra = set(given) - {"class_path", "init_args"}
    arguments = given.get("init_args") or {}
    if extra or not isinstance(given.get("class_path"), str) or not isinstance(arguments, Mapping):
        raise ValueError(f"{label} must be a class_path (an import path) with or without init_args, and nothing else")
    return given["class_path"], dict(arguments)


def _tools_of(given: Tools | Sequence[Any] | None, in_process: bool) -> dict[str, Tool]:
    if given is None:
        return {}
    entries = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not entries:
        raise ValueError("tools=[] must hold at least one tool")
    found: dict[str, Tool] = {}
    for row, entry in enumerate(entries):
        for tool in _resolve_tool(entry, f"tools[{row}]", in_process):
            if tool.name in found:
                raise ValueError(f"tools[{row}]={entry!r}: there are two tools of the name {tool.name!r}")
            found[tool.name] = tool
    return found


def _resolve_tool(given: Any, option: str, in_process: bool) -> list[Tool]:
    label, path = f"{option}={given!r}", None
    if isinstance(given, Mapping):
        given = _factory(given, option)[0]()
    elif isinstance(given, str):
        if not is_import_path(given):
            raise ValueError(f"{label} must be an import path, such as 'package.module.name'")
        path, given = given, import_object(given, label)
    if inspect.isroutine(given):
        if not in_process and path is None:
            raise ValueError(f"{label} must be an import path of a function with tool_options.in_process=False")
        return [tool_of(given, label, path=path)]
    if isinstance(given, type):
        given = _factory(given, option)[0]()
    if callable(given) or given is None or isinstance(given, int | float | bool | Sequence):
        raise ValueError(f"{label} must be a function, an import path, or an object whose methods are tools")
    if not in_process:
        raise ValueError(f"{label} must be an import path of a function with tool_options.in_process=False")
    if not (tools := methods_of(given, label)):
        raise ValueError(f"{label} has no public methods, which would be its tools")
    return tools
