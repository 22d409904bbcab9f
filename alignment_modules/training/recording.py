"""What a data module is told of a step, how well each prompt's completions did, and what it tells of its curriculum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from alignment_modules.functional.statistics import Statistic
from alignment_modules.rollouts.rollout import Rollout

if TYPE_CHECKING:
    from alignment_modules.training.module import AlignmentModule
    from alignment_modules.training.updates import UpdateModule


def tell_scores(data: Any, module: UpdateModule, batch: Mapping[str, Any], rollout: Rollout) -> dict[str, Statistic]:
    """Tells the mean reward of each prompt of all ranks to a data module that wants to know it (`follows_scores`).

    It calls `data.record(index, scores)`, on every rank with the same. A prompt of which no completion was judged is
    left out.

    Args:
        data: The Trainer's data module, or None.
        module: Who judged.
        batch: Its `index` says which row each prompt is.
        rollout: Its completions.

    Returns:
        What the data module tells of itself, to be logged.
    """
    if not getattr(data, "follows_scores", False) or "index" not in batch:
        return {}
    means = rollout.rewards.view(len(rollout), rollout.group).nanmean(dim=1)
    ranks = module.all_gather_ragged({"index": torch.as_tensor(batch["index"]), "scores": means})
    index, scores = (torch.cat([part[name].cpu() for part in ranks]) for name in ("index", "scores"))
    judged = ~scores.isnan()
    return _statistics(data.record(index[judged].tolist(), scores[judged].tolist()))


def curriculum_of(module: AlignmentModule) -> dict[str, Statistic]:
    """What the data module of a module that judges nothing tells of its curriculum, to be logged."""
    data: Any = getattr(module._trainer, "datamodule", None)
    if getattr(module, "tells_scores", False) or not getattr(data, "follows_scores", False):
        return {}
    return _statistics(data.record([], []))


def _statistics(told: Mapping[str, float]) -> dict[str, Statistic]:
    return {f"curriculum/{name}": Statistic(torch.tensor(value)) for name, value in told.items()}
