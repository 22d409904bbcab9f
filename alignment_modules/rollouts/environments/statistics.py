"""What is logged of episodes, as sums that stay exact under any split."""

from collections.abc import Sequence

import torch
from torch import Tensor

from alignment_modules.functional.sources import by_source
from alignment_modules.functional.statistics import RowSums, Statistic
from alignment_modules.rollouts.environments.episode import STOP_REASONS, Episode


def episode_statistics(
    episodes: Sequence[Episode], *, solved: Tensor | None = None, sources: Sequence[str] | None = None
) -> dict[str, Statistic]:
    """Calls, turns, tokens of tools and why episodes ended; the same names where there is no episode.

    Means an episode: `tools/calls`, `episode/turns`, `episode/tool_tokens`, and of those that are solved
    `tools/calls_solved`. Shares of the calls: `tools/failure_rate` and `tools/malformed`, which it includes. Shares of
    the episodes: `episode/stop/REASON` of each of `STOP_REASONS`, and `environment/errors`.

    Args:
        episodes: N of them, a prompt's beside each other.
        solved: [N] bool, which were right; None: that is not known, and nothing is told of those.
        sources: Where each prompt is from; calls, turns and failures are then told by source, too.

    Example:
        >>> episode = Episode("hidden", prompt=[], messages=[], turns=3, calls=[], stop_reason="max_turns")
        >>> told = episode_statistics([episode, episode])
        >>> [float(told[name].total / told[name].weight) for name in ("episode/turns", "episode/stop/max_turns")]
        [3.0, 1.0]
    """
    calls = _numbers([len(one.calls) for one in episodes])
    failures = _numbers([one.failures for one in episodes])
    malformed = _numbers([one.malformed for one in episodes])
    each = torch.ones_like(calls)
    sums = {
        "tools/calls": RowSums(calls, each),
        "tools/failure_rate": RowSums(failures, calls),
        "episode/turns": RowSums(_numbers([one.turns for one in episodes]), each),
    }
    told = by_source(sums, sources)
    sums |= {
        "tools/malformed": RowSums(malformed, calls),
        "episode/tool_tokens": RowSums(_numbers([one.tool_tokens for one in episodes]), each),
        "environment/errors": RowSums(_numbers([one.failed for one in episodes]), each),
    }
    for reason in STOP_REASONS:
        sums[f"episode/stop/{reason}"] = RowSums(_numbers([one.stop_reason == reason for one in episodes]), each)
    if solved is not None:
        right = solved.detach().double().cpu()
        sums["tools/calls_solved"] = RowSums(calls * right, right)
    return {name: one.mean for name, one in sums.items()} | told


def _numbers(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
