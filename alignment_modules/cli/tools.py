"""What a policy may call in a chat: tools and an environment, as a run takes them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignment_modules.cli.own_files import find_own_files
from alignment_modules.rollouts.environments import EnvironmentSet, ToolOptions

_MAX_TURNS = 8
_OPTIONS = ("environments", "tools", "max_turns", "max_tool_calls", "tool_options")


def add_tool_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what a policy may call."""
    group = parser.add_argument_group("tools")
    add = group.add_argument
    add("--tools", metavar="PATH", action="append", help="import path of a function or of a class; several: once each")
    add("--environments", metavar="PATH", help="import path of an environment, whose methods are tools")
    add("--config", metavar="FILE", help="a run's config.yaml, whose tools and environments these are")
    add("--row", metavar="JSON", help='columns that the environment begins with, such as {"highest": 100}')
    add("--max-turns", type=int, metavar="N", help=f"turns of the policy for a message (default {_MAX_TURNS})")
    add("--max-tool-calls", type=int, metavar="N", help="calls for a message (default: any number)")


@dataclass(frozen=True)
class Actions:
    """What a policy may call in a chat, and how much of it.

    Attributes:
        environments: The environment and the tools.
        options: How calls are read, run and answered.
        row: Columns that the environment begins with.
        max_turns: Turns of the policy for a message of the user.
        max_tool_calls: Calls likewise; None: any number.
    """

    environments: EnvironmentSet
    options: ToolOptions
    row: dict[str, Any]
    max_turns: int = _MAX_TURNS
    max_tool_calls: int | None = None

    @classmethod
    def of(cls, given: argparse.Namespace) -> Actions | None:
        """What `add_tool_options` was given; None: nothing.

        Raises:
            ValueError: If something cannot be found, or an option has no effect.
        """
        limits = {name: getattr(given, name) for name in ("max_turns", "max_tool_calls")}
        own = {"tools": given.tools, "environments": given.environments}
        if given.config and (twice := next((name for name, value in own.items() if value), None)):
            raise ValueError(f"{twice}={own[twice]!r} is not allowed with config={given.config!r}, which has its own")
        found = _configured(given.config) if given.config else own
        if not any(found.get(name) for name in own):
            if given.config:
                raise ValueError(f"config={given.config!r} names neither tools nor environments")
            unused = next((name for name, value in (limits | {"row": given.row}).items() if value is not None), None)
            if unused:
                raise ValueError(f"{unused}={getattr(given, unused)!r} has no effect without tools or environments")
            return None
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        find_own_files([given.config] if given.config else [])
        options = ToolOptions(**(found.get("tool_options") or {}))
        made = EnvironmentSet(found.get("environments"), found.get("tools"), in_process=options.in_process)
        row = _row(given.row)
        if row and not made.names:
            raise ValueError(f"row={given.row!r} has no effect without environments")
        kept = {name: value if value is not None else found.get(name) for name, value in limits.items()}
        return cls(made, options, row, kept["max_turns"] or _MAX_TURNS, kept["max_tool_calls"])

    def describe(self, name: str | None) -> str:
        """What there is and its limits, in a line."""
        tools = ", ".join(schema["function"]["name"] for schema in self.environments.schemas(name)) or "none"
        calls = "" if self.max_tool_calls is None else f" and {self.max_tool_calls:,} calls"
        return (
            f"tools {tools}{f' of {name}' if name else ''}; at most {self.max_turns:,} turns{calls} a message, "
            f"{self.options.time_limit:g} seconds a call, {self.options.max_result_length:,} tokens a result"
        )


def _configured(path: str) -> dict[str, Any]:
    """The options of a run's configuration that say what its policy acts on: those of training, else of evaluation.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with open(Path(path).expanduser(), encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config={path!r} cannot be read: {error}") from error
    model = found.get("model") if isinstance(found, Mapping) else None
    own = model.get("init_args", model) if isinstance(model, Mapping) else {}
    for options in (own, own.get("evaluation")) if isinstance(own, Mapping) else ():
        if isinstance(options, Mapping) and (options.get("environments") or options.get("tools")):
            return {name: options.get(name) for name in _OPTIONS}
    return {}


def _row(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"row={text!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f'row={text!r} must be an object of columns, such as {{"highest": 100}}')
    return found
