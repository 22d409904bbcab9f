"""Group relative policy optimization (arXiv:2402.03300) and its variants: sample, judge, compare, update."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.functional import ADVANTAGE_SCALES, group_advantages
from alignment_modules.functional.checks import check_choice
from alignment_modules.functional.ranges import Positive, check_options
from alignment_modules.policies.frozen import frozen_companion
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.tokenizers import compared_ids, tokenizer_path
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.groups import GroupModule
from alignment_modules.training.teacher_advantages import add_teacher


class GRPOModule(GroupModule):
    r"""Online RL without a critic, on batches of prompts.

    For each prompt G completions are sampled and judged; a completion's advantage is its reward compared with its
    group's. Then `num_iterations * minibatches` optimizer steps follow on these samples, each normalised by the count
    of its own tokens (or sequences) over all micro-batches and ranks.

    Args:
        scale_rewards: "group", "batch", "batch_tokens", "none", "leave_one_out" or "mean"; see `group_advantages` for
            the formulas.
        teacher: Whom the policy learns from beside the rewards, token by token: a folder or hub id, a `PolicyConfig` or
            a module, which is frozen in place. It must have the policy's vocabulary.
        teacher_coef: Weight of the teacher: `-teacher_coef (log p - log p_teacher)` is added to a token's advantage,
            also in groups of equal rewards.
        **policy_gradient: Keywords of `GroupModule` (mask_truncated, truncated_in_baseline, dynamic_sampling),
            `PolicyGradientModule` (beta, kl_estimator, kl_placement, epsilon, epsilon_high, delta, importance_level,
            num_iterations, minibatches, loss, loss_options, reduction, top_entropy_quantile, correction, entropy_coef,
            kl_target, kl_horizon, entropy_target, entropy_coef_delta, reference), `ActingModule` (rewards,
            reward_weights, num_generations, max_completion_length, temperature, top_p, top_k, min_p, stop_strings,
            missing_eos_penalty, seed), `UpdateModule` (micro_batch_size, max_grad_norm) and `AlignmentModule` (policy,
            optimizer, lr_scheduler, tokenizer, evaluation).

    Raises:
        ValueError: If an option has a value that is not allowed, or options contradict each other.
    """

    paradigm = "grpo"
    bar = ("reward", "completions/mean_length", "groups_with_signal")

    def __init__(
        self,
        *,
        scale_rewards: str = "group",
        teacher: str | PolicyConfig | nn.Module | None = None,
        teacher_coef: Positive = 1.0,
        **policy_gradient: Any,
    ) -> None:
        check_options(GRPOModule.__init__, locals())
        if policy_gradient.get("num_generations") == 1:
            raise ValueError("num_generations=1 must be at least 2: a group's completions are compared with each other")
        check_choice("scale_rewards", scale_rewards, ADVANTAGE_SCALES)
        if teacher is None and teacher_coef != 1.0:
            raise ValueError(f"teacher_coef={teacher_coef} is the weight of a teacher, and teacher=None")
        super().__init__(**policy_gradient)
        self.scale_rewards = scale_rewards
        self.teacher_coef, self._teacher_path = teacher_coef, tokenizer_path(teacher)
        self.teacher = None if teacher is None else frozen_companion(teacher, self.policy, name="teacher")

    def setup(self, stage: str) -> None:
        """Also checks that the teacher's tokens are the policy's.

        Raises:
            ValueError: If its tokenizer gives another id to a token, or its head has another size and no tokenizer
                tells which of its tokens count.
        """
        super().setup(stage)
        if self.teacher is not None:
            compared_ids(self.policy, self.teacher.module or self.policy, self.tokenizer, self._teacher_path)

    def credit(self, rollout: Rollout, penalty: Tensor | None) -> Rollout:
        """Compares completions with their group's; groups with fewer than two that are judged are left out."""
        rewards = rollout.rewards
        if penalty is not None:
            rewards = rewards - penalty.sum(dim=-1).to(rewards.device)
        judged = ~rollout.rewards.view(-1, rollout.group).isnan()
        compared = judged & (judged.sum(dim=1, keepdim=True) >= 2)
        advantages = self.advantages(rewards.view(-1, rollout.group), rollout.own.sum(dim=1).view(-1, rollout.group))
        found = replace(rollout, trained=rollout.trained & compared.view(-1, 1), advantages=advantages.flatten())
        if self.teacher is None:
            return found
        found, kl = add_teacher(self, found, self.teacher, self.teacher_coef)
        self._train_meters.update({"teacher_kl": kl})
        return found

    def advantages(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        """Advantages [prompts, G] of rewards [prompts, G], 0 where NaN; scaling by the batch spans all ranks.

        Args:
            rewards: [prompts, G]; NaN: not judged.
            lengths: [prompts, G], how many tokens the policy wrote.
        """
        if self.scale_rewards not in ("batch", "batch_tokens"):
            return group_advantages(rewards, scale=self.scale_rewards)

        def of_all(every: Tensor) -> Tensor:
            tokens = every[..., 1] if self.scale_rewards == "batch_tokens" else None
            return group_advantages(every[..., 0].to(rewards), scale=self.scale_rewards, lengths=tokens)

        return self.over_ranks(torch.stack([rewards.double(), lengths.double()], dim=-1), of_all)

    def describe(self) -> dict[str, str]:
        """Adds how completions are compared."""
        return super().describe() | {
            "advantages": f"{self.scale_rewards}, {self.actor.num_generations} completions a prompt; 0 where a "
            "group's rewards are equal"
            + f"; less {self.teacher_coef:g} times each token's log-ratio to the teacher"
            * (self.teacher is not None),
        }
