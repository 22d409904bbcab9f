"""What environments say of their episodes, as a reward and by turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignment_modules.rollouts.environments.episode import Episode

NAME = "environment"


class EnvironmentReward:
    """The reward `environment`: what `get_reward` gave and the sum of `turn_rewards`, as far as there are such.

    It does not apply to episodes whose environment has neither, or failed.
    """

    name = NAME

    def __call__(self, episodes: Sequence[Episode]) -> list[float | None]:
        """One number an episode.

        Args:
            episodes: One a completion.
        """
        return [_total(episode) for episode in episodes]


def placed_turn_rewards(episodes: Sequence[Episode], own: Tensor) -> Tensor:
    """The `turn_rewards` of episodes at the last token of each turn: [N, T] float32, 0 elsewhere.

    Args:
        episodes: N.
        own: [N, T] bool, on the host: what the policy wrote; each turn is a run of it.
    """
    following = torch.nn.functional.pad(own[:, 1:], (0, 1))
    ends = own & ~following
    found = torch.zeros(own.shape)
    for row, episode in enumerate(episodes):
        if episode.turn_rewards is not None:
            found[row, ends[row]] = torch.tensor(episode.turn_rewards, dtype=torch.float32)
    return found


def failed(episodes: Sequence[Episode]) -> Tensor:
    """[N] bool: whose environment failed, so that nobody judges them."""
    return torch.tensor([episode.failed for episode in episodes], dtype=torch.bool)


def _total(episode: Episode) -> float | None:
    parts = [] if episode.reward is None else [episode.reward]
    parts += episode.turn_rewards or []
    return sum(parts) if parts else None
