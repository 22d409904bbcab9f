"""From the options that people give to what runs episodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.environments.formats import tool_format
from alignment_modules.rollouts.environments.loop import MAX_TURNS, Episodes
from alignment_modules.rollouts.environments.options import ToolOptions
from alignment_modules.rollouts.environments.tool_set import EnvironmentSet, Tools


def make_episodes(
    environments: Any,
    tools: Tools | None,
    *,
    codec: Codec,
    max_turns: int = MAX_TURNS,
    max_tool_calls: int | None = None,
    tool_options: ToolOptions | Mapping[str, Any] | None = None,
    option: str = "",
) -> Episodes | None:
    """What runs episodes; None where there is nothing to act on.

    Args:
        environments: As in `EnvironmentSet`.
        tools: Likewise.
        codec: The tokenizer and its stop tokens.
        max_turns: As in `Episodes`.
        max_tool_calls: Likewise.
        tool_options: How calls are read, run and answered; from a checkpoint as a mapping.
        option: What stands before an option's name in messages.

    Raises:
        ValueError: If an environment or tool cannot be found or made, or an option would have no effect.
    """
    given = {"max_turns": max_turns != MAX_TURNS, "max_tool_calls": max_tool_calls, "tool_options": tool_options}
    values = {"max_turns": max_turns, "max_tool_calls": max_tool_calls, "tool_options": tool_options}
    if environments is None and tools is None:
        if unread := next((name for name, one in given.items() if one), None):
            raise ValueError(
                f"{option}{unread}={values[unread]!r} has no effect without {option}environments or {option}tools"
            )
        return None
    options = ToolOptions(**tool_options) if isinstance(tool_options, Mapping) else tool_options or ToolOptions()
    try:
        if options.format is not None:
            tool_format(options.format)
        found = EnvironmentSet(environments, tools, in_process=options.in_process)
    except ValueError as error:
        raise ValueError(f"{option}{error}") from error
    return Episodes(found, codec, max_turns=max_turns, max_tool_calls=max_tool_calls, options=options)
