"""Episodes as rows: for people, and for files that fine-tuning reads again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alignment_modules.rollouts.environments.episode import Episode

Messages = list[dict[str, Any]]


def episode_row(episode: Episode, schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An episode as a row of JSONL, which fine-tuning reads by its `messages` and `tools`.

    Args:
        episode: The episode.
        schemas: Of its tools.

    Returns:
        `messages`, the prompt and all that followed; `tools`; `turns`, `tool_calls` and `tool_failures` as numbers;
        `stop_reason`; and where there is such, `environment_reward`, `turn_rewards` (None: it failed) and
        `environment_errors`.
    """
    found: dict[str, Any] = {"messages": [*episode.prompt, *episode.messages], "tools": list(schemas)}
    found |= {name: values[0] for name, values in _counted([episode]).items()}
    if episode.reward is not None:
        found["environment_reward"] = _number(episode.reward)
    if episode.turn_rewards is not None:
        found["turn_rewards"] = [_number(each) for each in episode.turn_rewards]
    if episode.errors:
        found["environment_errors"] = episode.errors
    return found


def episode_columns(episodes: Sequence[Episode], *, whole: bool = True) -> dict[str, list[Any]]:
    """Episodes in words: a list a column, with an entry an episode.

    Args:
        episodes: The episodes.
        whole: Whether `messages`, those of the prompt, and `episode`, those that followed, are among them. There a
            result says in `failed` why its call failed.

    Returns:
        `stop_reason`, `turns`, `tool_calls`, `tool_failures`, and where an environment failed `environment_errors`.
    """
    columns = _counted(episodes)
    if any(one.errors for one in episodes):
        columns["environment_errors"] = ["; ".join(one.errors) or None for one in episodes]
    if whole:
        columns |= {"messages": [one.prompt for one in episodes], "episode": [_marked(one) for one in episodes]}
    return columns


def _counted(episodes: Sequence[Episode]) -> dict[str, list[Any]]:
    return {
        "stop_reason": [one.stop_reason for one in episodes],
        "turns": [one.turns for one in episodes],
        "tool_calls": [len(one.calls) for one in episodes],
        "tool_failures": [one.failures for one in episodes],
    }


def _marked(episode: Episode) -> Messages:
    """The messages behind the prompt; those of calls that failed say why."""
    reasons = iter([made.result.reason for made in episode.calls])
    found = []
    for message in episode.messages:
        reason = next(reasons, "") if message["role"] == "tool" else ""
        found.append({**message, "failed": reason} if reason else message)
    return found


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
