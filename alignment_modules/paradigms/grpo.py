"""Group relative policy optimization (arXiv:2402.03300) and its variants: sample, judge, compare, update."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from alignment_modules.functional import (
    AdvantageEstimator,
    decoupled_rewards,
    gradient_norms,
    optimal_token_advantages,
    returns_to_go,
)
from alignment_modules.functional.ranges import check_options
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.policy_gradient import PolicyGradientModule


class GRPOModule(PolicyGradientModule):
    r"""Online RL without a critic, on batches of prompts.

    For each prompt G completions are sampled and judged; a completion's advantage is its reward less a baseline, such
    as its group's mean. Then `num_iterations * minibatches` optimizer steps follow on these samples, each normalised by
    the count of its own tokens (or sequences) over all micro-batches and ranks.

    Args:
        scale_rewards: What advantages are divided by: "group", "batch", "batch_tokens", "none", "mean", or
            "leave_one_out", short for that baseline with "none"; see `group_advantages` for the formulas. None: the
            baseline's own.
        baseline: What is subtracted from a reward: "group" (its mean), "leave_one_out", "length_weighted" (OPO),
            "pass_at_k", "greedy" (ReMax), "none" (REINFORCE++) or "optimal_token" (OTB). None: "group".
        multi_objective_aggregation: "sum_then_normalize", or "normalize_then_sum" (GDPO): each reward is normalised in
            its group before they are summed.
        **policy_gradient: Keywords of `PolicyGradientModule` (beta, kl_estimator, kl_placement, epsilon, epsilon_high,
            delta, importance_level, num_iterations, minibatches, loss, loss_options, reduction, mask_truncated,
            entropy_coef, kl_target, kl_horizon, entropy_target, entropy_coef_delta, reference),
            `ActingModule` (rewards, reward_weights, num_generations, max_completion_length, temperature, top_p, top_k,
            min_p, stop_strings, missing_eos_penalty, seed), `UpdateModule` (micro_batch_size, max_grad_norm) and
            `AlignmentModule` (policy, optimizer, lr_scheduler, tokenizer, evaluation).

    Raises:
        ValueError: If an option has a value that is not allowed, or options contradict each other.
    """

    paradigm = "grpo"
    bar = ("reward", "completions/mean_length", "groups_with_signal")

    def __init__(
        self,
        *,
        scale_rewards: str | None = None,
        baseline: str | None = None,
        multi_objective_aggregation: str = "sum_then_normalize",
        **policy_gradient: Any,
    ) -> None:
        check_options(GRPOModule.__init__, locals())
        estimator = AdvantageEstimator(scale_rewards, baseline, multi_objective_aggregation)
        if policy_gradient.get("num_generations") == 1 and estimator.grouped:
            raise ValueError(
                f"num_generations=1 must be at least 2: with baseline={estimator.baseline!r} a group's completions are "
                "compared with each other"
            )
        super().__init__(**policy_gradient)
        self.estimator = estimator
        if estimator.decoupled:
            self._check_decoupled()

    def _check_decoupled(self) -> None:
        """Refuses what would be taken from the sum of rewards, which is not read where each is normalised."""
        penalties = {
            "beta": self.beta if self.kl_placement == "reward" else 0.0,
            "missing_eos_penalty": self.actor.missing_eos_penalty,
        }
        if len(self.rewards) < 2:
            raise ValueError(
                "multi_objective_aggregation='normalize_then_sum' needs two or more rewards, got "
                f"{', '.join(self.rewards.names)}"
            )
        for name, value in penalties.items():
            if value:
                raise ValueError(
                    f"{name}={value} is taken from the sum of the rewards, which multi_objective_aggregation="
                    "'normalize_then_sum' does not read: set it to 0, or kl_placement='loss'"
                )

    @property
    def fewest_completions(self) -> int:
        """2 where a prompt's completions are compared with each other, else 1."""
        return 2 if self.estimator.grouped else 1

    @property
    def compares_with_greedy(self) -> bool:
        """Whether a greedy completion of each prompt is the baseline."""
        return self.estimator.baseline == "greedy"

    def check_batch(self, batch: Any) -> None:
        """Also checks that each given reward is there by itself, where each is normalised.

        Raises:
            ValueError: If the batch brings their sum alone.
        """
        super().check_batch(batch)
        given = batch.get("rewards")
        if self.estimator.decoupled and isinstance(given, Tensor) and given.dim() != 2:
            raise ValueError(
                "multi_objective_aggregation='normalize_then_sum' normalises each reward: the batch's rewards must be "
                f"[completions, {len(self.rewards)}], got shape {tuple(given.shape)}"
            )

    def annotate(self, rollout: Rollout) -> Rollout:
        """Also adds the norms that the optimal token baseline reads, from the pass that scores the old policy."""
        if self.estimator.baseline == "optimal_token":
            scores = self.scores_of(rollout, ask=["collision"])
            rollout = replace(
                rollout, gradient_norms=gradient_norms(scores.token_logps, cast(Tensor, scores.collision))
            )
            if rollout.old_logps is None and rollout.support is None:  # else the penalty reads the whole vocabulary's
                rollout = replace(rollout, old_logps=scores.token_logps)
        return super().annotate(rollout)

    def credit(self, rollout: Rollout, penalty: Tensor | None) -> Rollout:
        """Compares rewards with their baseline; completions that are compared with no other are left out.

        A penalty is taken from the reward of the whole completion where that is compared with the others', else from
        each token's: its advantage then counts what is still to come.
        """
        estimator, group = self.estimator, rollout.group
        rewards = rollout.rewards.view(-1, group)
        if estimator.decoupled:
            values = cast(Tensor, rollout.reward_values).view(-1, group, len(self.rewards))
            rewards = decoupled_rewards(values.double(), torch.tensor(self.rewards.weights))
        lengths = rollout.own.sum(dim=1).view(-1, group)
        rewards = rewards.masked_fill(~lengths.any(dim=1, keepdim=True), torch.nan)  # of nothing that can be learnt
        judged = ~rewards.isnan()
        if rollout.greedy_rewards is not None:
            judged = judged & ~rollout.greedy_rewards.isnan()[:, None]
        if estimator.grouped:
            judged = judged & (judged.sum(dim=1, keepdim=True) >= 2)
        if estimator.baseline == "optimal_token" or (penalty is not None and estimator.to_go):
            advantages = self._token_advantages(rollout, rewards, judged, penalty)
        else:
            costs = 0.0 if penalty is None else penalty.sum(dim=-1).cpu().view(-1, group)
            advantages = self.advantages(rewards - costs, lengths, rollout.greedy_rewards)
            advantages = advantages.flatten()
        return replace(rollout, trained=rollout.trained & judged.view(-1, 1), advantages=advantages.float())

    def advantages(self, rewards: Tensor, lengths: Tensor, greedy_rewards: Tensor | None = None) -> Tensor:
        """Advantages [prompts, G] of rewards [prompts, G], 0 where NaN; scaling by the batch spans all ranks.

        Args:
            rewards: [prompts, G]; NaN: not judged.
            lengths: [prompts, G], how many tokens the policy wrote.
            greedy_rewards: [prompts], of greedy completions, where they are the baseline.
        """
        if not self.estimator.spans_batch:
            return self.estimator(rewards, lengths=lengths, greedy_rewards=greedy_rewards)
        told = [rewards.double(), lengths.double()]
        if greedy_rewards is not None:
            told.append(greedy_rewards.double()[:, None].expand(rewards.shape))

        def of_all(every: Tensor) -> Tensor:
            found, counts, *greedy = every.unbind(dim=-1)
            first = greedy[0][:, 0] if greedy else None
            return self.estimator(found.to(rewards), lengths=counts, greedy_rewards=first)

        return self.over_ranks(torch.stack(told, dim=-1), of_all)

    def _token_advantages(self, rollout: Rollout, rewards: Tensor, judged: Tensor, penalty: Tensor | None) -> Tensor:
        """Advantages [N, T] of single tokens, on the host."""
        mask, shape = rollout.own & judged.view(-1, 1), (len(rollout), rollout.group, -1)
        if rollout.greedy_rewards is not None:
            rewards = rewards - rollout.greedy_rewards[:, None]
        values = returns_to_go(rewards.flatten(), mask, None if penalty is None else penalty.cpu())
        if rollout.gradient_norms is not None:
            norms = rollout.gradient_norms.cpu().view(shape)
            values = optimal_token_advantages(values.view(shape), norms, mask.view(shape)).flatten(0, 1)
        return self.whiten_over_ranks(values, mask) if self.estimator.spans_batch else values

    def describe(self) -> dict[str, str]:
        """Adds what rewards are compared with."""
        equal = "; 0 where a group's rewards are equal" if self.estimator.grouped else ""
        return super().describe() | {
            "advantages": f"{self.estimator.describe()}, {self.actor.num_generations} completions a prompt{equal}"
        }
