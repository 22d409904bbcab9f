"""Groups that wait until there are enough of them for an update (dynamic sampling, DAPO, arXiv:2503.14476)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from alignment_modules.functional.statistics import Statistic
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.meters import Meters, Reduce


@dataclass(frozen=True)
class WaitingGroups:
    """The informative groups of the batches that were drawn for the next update.

    No step is taken between these batches, so that all groups are samples of the policy as it is, whenever they came.

    Attributes:
        rollout: This rank's groups; None before the first batch.
        draws: Batches drawn.
        found: Groups of all ranks.
        wanted: Groups that an update is made of: the prompts of the largest of the batches, on all ranks.
        tokens: Tokens of all completions drawn on this rank, with their prompts.
        meters: What is to be logged of all completions drawn on this rank.
    """

    rollout: Rollout | None = None
    draws: int = 0
    found: int = 0
    wanted: int = 0
    tokens: int = 0
    meters: Meters = field(default_factory=Meters)

    def add(
        self,
        drawn: Rollout,
        informative: Tensor,
        *,
        reduce: Reduce,
        device: torch.device | str = "cpu",
        tokens: int = 0,
        statistics: Mapping[str, Statistic] | None = None,
    ) -> WaitingGroups:
        """These and the informative groups of one more batch, which come last.

        Args:
            drawn: The batch's completions.
            informative: [P] bool, on the host: which groups can teach something.
            reduce: `reduce(tensor, "sum")` over all ranks, each of which must call this.
            device: Where the sums are added up.
            tokens: Of the batch's completions and prompts.
            statistics: What is to be logged of the batch.

        Raises:
            ValueError: If the completions do not fit those before (`Rollout.join`).
        """
        chosen = drawn.select(informative)
        held = chosen if self.rollout is None else Rollout.join([self.rollout, chosen])
        counts = torch.tensor([len(chosen), len(drawn)], device=device)
        found, prompts = (int(count) for count in reduce(counts, "sum").tolist())
        meters = self.meters.copy()
        meters.update(statistics or {})
        return replace(
            self,
            rollout=held,
            draws=self.draws + 1,
            found=self.found + found,
            wanted=max(self.wanted, prompts),
            tokens=self.tokens + tokens,
            meters=meters,
        )

    def are_due(self, cap: int) -> bool:
        """Whether the update is to be made: there are enough, or `cap` batches were drawn."""
        return self.found >= self.wanted or self.draws >= cap

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain numbers and tensors on the host, of this rank."""
        numbers = {name: getattr(self, name) for name in ("draws", "found", "wanted", "tokens")}
        rollout = None if self.rollout is None else self.rollout.state_dict()
        return {**numbers, "rollout": rollout, "meters": self.meters.state_dict()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> WaitingGroups:
        """The groups that gave this state.

        Args:
            state: What `state_dict` gave.
            device: Where the numbers to be logged go; the groups follow those of the next batch.
        """
        meters = Meters()
        meters.load_state_dict(state["meters"], torch.device(device))
        rollout = None if state["rollout"] is None else Rollout(**state["rollout"])
        return cls(**{**state, "rollout": rollout, "meters": meters})


def with_advantages(drawn: Rollout, informative: Tensor, learnt: Rollout) -> Rollout:
    """A batch's completions with the advantages that its informative groups got; the others taught nothing: 0.

    Args:
        drawn: All completions of the last batch.
        informative: [P] bool, on the host: its informative groups.
        learnt: What the update was made of: these groups come last.
    """
    given, rows = learnt.advantages, informative.repeat_interleave(drawn.group)
    if given is None:
        return drawn
    own = given[len(given) - int(rows.sum()) :]
    if own.dim() > 1:
        own = own[:, : drawn.ids.shape[1]]
    advantages = own.new_zeros(len(rows), *own.shape[1:])
    advantages[rows.to(own.device)] = own
    return replace(drawn, advantages=advantages)
