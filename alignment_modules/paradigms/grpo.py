"""Group relative policy optimization (arXiv:2402.03300) and its variants: sample, judge, compare, update."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignment_modules.functional import AdvantageEstimator, gradient_norms, informative_groups
from alignment_modules.functional.ranges import NonNegative, Positive, check_options
from alignment_modules.policies.frozen import frozen_companion
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.scoring import Ask, Scores
from alignment_modules.policies.tokenizers import compared_ids, tokenizer_path
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.crediting import (
    add_advantages,
    check_decoupled,
    check_turns,
    returns_of_turns,
    single_rewards,
)
from alignment_modules.training.groups import GroupModule
from alignment_modules.training.presets import Settings
from alignment_modules.training.teacher_advantages import add_teacher


class GRPOModule(GroupModule):
    r"""Online RL without a critic, on batches of prompts.

    For each prompt G completions are sampled and judged; a completion's advantage is its reward less a baseline, such
    as its group's mean. Then `num_iterations * minibatches` optimizer steps follow on these samples, each normalised by
    the count of its own tokens (or sequences) over all micro-batches and ranks.

    Args:
        preset: Settings of a paper: "grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo", "gmpo", "rloo", "reinforce_pp",
            "remax", "opo", "maxrl", "lite_ppo" or "gdpo". What is given beside it, and is not null, takes its place.
        loss: "grpo", "dapo", "bnpo", "dr_grpo" (PPO's clip, reduced another way), "luspo", "cispo", "sapo", "gmpo",
            "vespo", "dppo_tv", "dppo_kl", "reinforce", "clip_cov" or "kl_cov"; see `policy_gradient_loss`. Here and
            below, where the preset says nothing: "dapo".
        scale_rewards: What advantages are divided by: "group", "batch", "batch_tokens", "none", "mean", or
            "leave_one_out", short for that baseline with "none"; see `group_advantages`. Else: the baseline's own.
        baseline: What is subtracted from a reward: "group" (its mean), "leave_one_out", "length_weighted" (OPO),
            "pass_at_k", "greedy" (ReMax), "none" (REINFORCE++), "optimal_token" (OTB). Else: "group".
        multi_objective_aggregation: "sum_then_normalize", or "normalize_then_sum" (GDPO): each reward is normalised in
            its group before they are summed. Else: the first.
        advantage_unit: What has an advantage: a "completion", or a "turn", an unbroken run of the policy's tokens.
            A turn's return, its reward by `turn_rewards` of the environments and all that is still to come, is compared
            with that of the same turn of the group's others, after GTPO (arXiv:2511.14846).
        beta: Strength of the KL penalty against the reference; 0: no reference is held. Else: 0.
        kl_estimator: "k1", "k2", "k3", or "k1+score", "k3+score" (the estimator times the ratio). Else: "k3".
        kl_placement: "loss", or "reward" (then only "k1"). Combinations that collapse are refused. Else: "loss".
        teacher: Whom the policy learns from beside the rewards, token by token: a folder or hub id, a `PolicyConfig` or
            a module, which is frozen in place. It must have the policy's vocabulary.
        teacher_coef: Weight of the teacher: `-teacher_coef (log p - log p_teacher)` is added to a token's advantage,
            also in groups of equal rewards.
        **policy_gradient: Keywords of `GroupModule` (mask_truncated, truncated_in_baseline, dynamic_sampling),
            `PolicyGradientModule` (epsilon, epsilon_high, delta, importance_level, num_iterations, minibatches,
            loss_options, reduction, top_entropy_quantile, correction, entropy_coef, kl_target, kl_horizon,
            entropy_target, entropy_coef_delta, reference), `ActingModule` (rewards, reward_weights, num_generations,
            max_completion_length, temperature, top_p, top_k, min_p, stop_strings, missing_eos_penalty, seed),
            `EngineModule` (engine), `UpdateModule` (micro_batch_size, max_grad_norm) and `AlignmentModule` (policy,
            optimizer, lr_scheduler, tokenizer, evaluation).

    Raises:
        ValueError: If an option has a value that is not allowed, or options contradict each other.
    """

    paradigm = "grpo"
    bar = ("reward", "completions/mean_length", "groups_with_signal")

    def __init__(
        self,
        *,
        preset: str | None = None,
        loss: str | None = None,
        scale_rewards: str | None = None,
        baseline: str | None = None,
        multi_objective_aggregation: str | None = None,
        advantage_unit: Literal["completion", "turn"] = "completion",
        beta: NonNegative | None = None,
        kl_estimator: str | None = None,
        kl_placement: Literal["loss", "reward"] | None = None,
        teacher: str | PolicyConfig | nn.Module | None = None,
        teacher_coef: Positive = 1.0,
        **policy_gradient: Any,
    ) -> None:
        check_options(GRPOModule.__init__, locals())
        if teacher is None and teacher_coef != 1.0:
            raise ValueError(f"teacher_coef={teacher_coef} is the weight of a teacher, and teacher=None")
        compared = {
            "scale_rewards": scale_rewards,
            "baseline": baseline,
            "multi_objective_aggregation": multi_objective_aggregation,
        }
        given = {"loss": loss, "beta": beta, "kl_estimator": kl_estimator, "kl_placement": kl_placement}
        settings = Settings(preset, policy_gradient | given | compared)
        with settings.told():
            options = settings.resolved
            estimator = AdvantageEstimator(**{name: options.pop(name) for name in compared if name in options})
            if policy_gradient.get("num_generations") == 1 and estimator.grouped:
                raise ValueError(
                    f"num_generations=1 must be at least 2: with baseline={estimator.baseline!r} a group's completions "
                    "are compared with each other"
                )
            if policy_gradient.get("dynamic_sampling") is not None and not estimator.grouped:
                raise ValueError(
                    f"dynamic_sampling={policy_gradient['dynamic_sampling']} replaces groups of equal rewards, which "
                    f"teach something with baseline={estimator.baseline!r}: it must be null"
                )
            policy_gradient |= options
            super().__init__(**policy_gradient)
            check_decoupled(self, estimator, self.beta if self.kl_placement == "reward" else 0.0)
            if advantage_unit == "turn":
                check_turns(self, estimator, self.surrogate)
        self.settings, self.estimator, self.advantage_unit = settings, estimator, advantage_unit
        self.teacher_coef, self._teacher_path = teacher_coef, tokenizer_path(teacher)
        self.teacher = None if teacher is None else frozen_companion(teacher, self.policy, name="teacher")

    @property
    def fewest_completions(self) -> int:
        """2 where a prompt's completions are compared with each other, else 1."""
        return 2 if self.estimator.grouped else 1

    @property
    def compares_with_greedy(self) -> bool:
        """Whether a greedy completion of each prompt is the baseline."""
        return self.estimator.baseline == "greedy"

    def setup(self, stage: str) -> None:
        """Also checks that the teacher's tokens are the policy's.

        Raises:
            ValueError: If its tokenizer gives another id to a token, or its head has another size and no tokenizer
                tells which of its tokens count.
        """
        super().setup(stage)
        if self.teacher is not None:
            compared_ids(self.policy, self.teacher.module or self.policy, self.tokenizer, self._teacher_path)

    def check_batch(self, batch: Any) -> None:
        """Also checks that each given reward is there by itself, where each is normalised, and rewards of turns are.

        Raises:
            ValueError: If the batch brings their sum alone, or completions where turns are compared.
        """
        super().check_batch(batch)
        if self.advantage_unit == "turn" and "responses" in batch:
            raise ValueError(
                "advantage_unit='turn' reads turn_rewards of environments: a batch must bring no responses"
            )
        given = batch.get("rewards")
        if self.estimator.decoupled and isinstance(given, Tensor) and given.dim() != 2:
            raise ValueError(
                "multi_objective_aggregation='normalize_then_sum' normalises each reward: the batch's rewards must be "
                f"[completions, {len(self.rewards)}], got shape {tuple(given.shape)}"
            )

    def informative(self, rollout: Rollout) -> Tensor:
        """[P] bool, on the host: also where parts differ that are equal in sum, if each is compared by itself."""
        if self.advantage_unit == "turn":
            compared = self.compared(rollout)
            turns = informative_groups(returns_of_turns(compared, compared.rewards.view(-1, rollout.group)))
            return turns.view(len(rollout), len(turns) // max(len(rollout), 1)).any(dim=1)
        if not self.estimator.decoupled:
            return super().informative(rollout)
        values = single_rewards(self, self.compared(rollout))
        return torch.stack([informative_groups(one) for one in values.unbind(dim=2)]).any(dim=0)

    def asked_at_start(self) -> list[Ask]:
        """Adds what the optimal token baseline weighs with."""
        more: list[Ask] = ["collision"] if self.estimator.baseline == "optimal_token" else []
        return super().asked_at_start() + more

    def with_scores(self, rollout: Rollout, scores: Scores) -> Rollout:
        """Keeps the norms of the gradients, for the optimal token baseline."""
        if scores.collision is None:
            return rollout
        return replace(rollout, gradient_norms=gradient_norms(scores.token_logps, scores.collision))

    def credit(self, rollout: Rollout, penalty: Tensor | None) -> Rollout:
        """Compares rewards with their baseline, and adds what the teacher thinks."""
        rollout = add_advantages(self, rollout, self.estimator, penalty, unit=self.advantage_unit)
        if self.teacher is None:
            return rollout
        rollout, kl = add_teacher(self, rollout, self.teacher, self.teacher_coef)
        self._train_meters.update({"teacher_kl": kl})
        return rollout

    def describe(self) -> dict[str, str]:
        """Adds what rewards are compared with, and the preset that this comes from."""
        equal = "; 0 where a group's rewards are equal" if self.estimator.grouped else ""
        if self.advantage_unit == "turn":
            equal += "; by turn, whose reward is what is still to come"
        elif self.beta and self.kl_placement == "reward" and self.estimator.to_go:
            equal += "; of the KL each token counts what is still to come"
        preset = {"preset": self.settings.describe()} if self.settings.preset else {}
        return (
            super().describe()
            | preset
            | {
                "advantages": f"{self.estimator.describe()}, {self.actor.num_generations} completions a prompt{equal}"
                + f"; less {self.teacher_coef:g} times each token's log-ratio to the teacher"
                * (self.teacher is not None),
            }
        )
