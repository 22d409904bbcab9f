"""What paradigms share that compare a prompt's completions: which are compared, and which groups are learnt from."""

from dataclasses import replace
from time import monotonic
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from alignment_modules.functional import informative_groups
from alignment_modules.functional.ranges import Count, check_options
from alignment_modules.functional.statistics import Statistic
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.checkpoint import per_rank
from alignment_modules.training.dynamic_sampling import WaitingGroups, with_advantages
from alignment_modules.training.policy_gradient import PolicyGradientModule


class GroupModule(PolicyGradientModule):
    """Base of paradigms whose advantages come from comparing the completions of a prompt.

    With `dynamic_sampling`, only groups that can teach something are learnt from, and an update waits for as many of
    them as a batch has prompts (DAPO, arXiv:2503.14476, section 3.2): batches are drawn, by as many calls of
    `training_step`, until there are enough or the cap is reached. All that was found is then learnt from, also what is
    more than was wanted: nothing is thrown away, nothing waits for a policy that has moved on. What is logged of
    rewards and lengths is of all completions. Batches without a step leave `global_step` as it is, so that the steps of
    a run, and a schedule's length, are at most what the number of batches says; set `max_steps` for an exact one.

    Args:
        mask_truncated: Leave completions that hit the length limit out of the loss. Those that no reward applies to are
            in neither loss nor comparison.
        truncated_in_baseline: Whether completions that `mask_truncated` leaves out of the loss are still compared with
            the others of their group (Skywork-OR1, arXiv:2505.22312, has both).
        dynamic_sampling: Most batches drawn for an update; 1: groups are left out, but not replaced; None: all groups
            are kept.
        **policy_gradient: Keywords of `PolicyGradientModule`.

    Raises:
        ValueError: If an option has a value that is not allowed, or would have no effect.
    """

    def __init__(
        self,
        *,
        mask_truncated: bool = False,
        truncated_in_baseline: bool = True,
        dynamic_sampling: Count | None = None,
        **policy_gradient: Any,
    ) -> None:
        check_options(GroupModule.__init__, locals())
        if not (truncated_in_baseline or mask_truncated):
            raise ValueError(
                "truncated_in_baseline=False needs mask_truncated=True: what is in the loss has to be compared"
            )
        super().__init__(**policy_gradient)
        self.mask_truncated, self.truncated_in_baseline = mask_truncated, truncated_in_baseline
        self.dynamic_sampling = dynamic_sampling
        self.waiting = WaitingGroups()
        self._restored_waiting: dict[str, Any] | None = None

    @property
    def may_take_fewer_steps(self) -> bool:
        """Whether `total_optimizer_steps` is a bound: several batches may make one update."""
        return self.dynamic_sampling is not None

    def informative(self, rollout: Rollout) -> Tensor:
        """[P] bool, on the host: which groups have two rewards that differ, of completions that are compared."""
        return informative_groups(self.compared(rollout).rewards.view(-1, rollout.group)).cpu()

    def compared(self, rollout: Rollout) -> Rollout:
        """The same with rewards only where a completion is compared with others; NaN elsewhere."""
        if self.truncated_in_baseline:
            return rollout
        return replace(rollout, rewards=rollout.rewards.masked_fill(rollout.truncated, torch.nan))

    def annotate(self, rollout: Rollout) -> Rollout:
        """Leaves truncated completions out of the comparison, where that is asked for."""
        return replace(super().annotate(self.compared(rollout)), rewards=rollout.rewards)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        """Rolls out, annotates, updates; with `dynamic_sampling` only once enough groups can teach something."""
        if self.dynamic_sampling is None:
            return super().training_step(batch, batch_idx)
        self.require_trainer()
        started, waiting = monotonic(), self.waiting
        drawn = self.act(batch, draw=waiting.draws)
        if batch_idx == 0:
            self.check_minibatches(self.largest(drawn), self.minibatches)
        informative = self.informative(drawn)
        waiting = waiting.add(
            drawn,
            informative,
            reduce=self.reduce,
            device=self.device,
            tokens=int(self.count_tokens(batch)["tokens"]),
            # of all draws of an update: only the update itself counts as one
            statistics=self.actor.statistics | {"time/rollout": Statistic(torch.tensor(monotonic() - started), 0.0)},
        )
        if waiting.are_due(self.dynamic_sampling):
            self._learn_from(waiting, drawn, informative)
            waiting = WaitingGroups()
        self.waiting = waiting  # last: a batch that fails is drawn again by a run that resumes
        return None

    def _learn_from(self, waiting: WaitingGroups, drawn: Rollout, informative: Tensor) -> None:
        """The update on all groups that waited; `rollout` is then the last batch, with what it was given."""
        started, found = monotonic(), waiting.rollout or drawn.empty()
        self._train_meters.absorb(waiting.meters)
        self.window.tokens = self.window.tokens + waiting.tokens
        given = found.old_logps is not None and not self.rescores_old
        learnt = self.annotate(found)
        self.rollout = with_advantages(drawn, informative, learnt)
        self._train_meters.update(
            {
                "time/rollout": Statistic(torch.tensor(monotonic() - started)),
                "dynamic_sampling/draws": Statistic(torch.tensor(float(waiting.draws))),
                "dynamic_sampling/groups": Statistic(torch.tensor(float(waiting.found))),
            }
        )
        self.learn(learnt, given=given, first=False)

    def extra_state(self) -> dict[str, Any]:
        """Adds the groups that wait, of each rank."""
        state = super().extra_state()
        if self.dynamic_sampling is not None:
            own = self.waiting.state_dict()
            state["waiting_groups"] = [own] if self._trainer is None else per_rank(self.trainer, own)
            if state["waiting_groups"] is None and self.waiting.draws:
                rank_zero_warn(
                    f"this checkpoint lacks the groups of {self.waiting.draws} batches that wait for an update: a run "
                    "of several processes was interrupted. A run that resumes from it goes on without them"
                )
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes up the groups that wait.

        Raises:
            ValueError: If some wait, of another number of processes.
        """
        super().load_extra_state(state)
        ranks, rank = state.get("waiting_groups"), 0
        if ranks is None or self.dynamic_sampling is None:
            return
        if self._trainer is not None and self.trainer.world_size != len(ranks):
            if any(own["draws"] for own in ranks):
                raise ValueError(
                    f"this checkpoint holds groups of {len(ranks)} processes that wait for an update, and this run has "
                    f"{self.trainer.world_size}: resume with as many"
                )
            return
        self._restored_waiting = ranks[rank if self._trainer is None else self.global_rank]

    def on_train_start(self) -> None:
        """Goes on with the groups of a checkpoint, or begins with none."""
        super().on_train_start()
        state, self._restored_waiting = self._restored_waiting, None
        self.waiting = WaitingGroups() if state is None else WaitingGroups.from_state(state, self.device)

    def on_train_end(self) -> None:
        """Says so where the run ends with groups that no update was made of."""
        super().on_train_end()
        if self.waiting.draws:
            rank_zero_warn(
                f"the last {self.waiting.draws} batches were not learnt from: {self.waiting.found} of "
                f"{self.waiting.wanted} groups were found whose rewards differ "
                f"(dynamic_sampling={self.dynamic_sampling}). A run that resumes from the last checkpoint goes on with "
                "them"
            )

    def describe(self) -> dict[str, str]:
        """Adds which groups are learnt from."""
        if self.dynamic_sampling is None:
            return super().describe()
        return super().describe() | {
            "dynamic sampling": "groups whose rewards differ, as many as a batch has prompts or more, of at most "
            f"{self.dynamic_sampling} batches an update; a run's steps are at most those that its batches would make"
        }
