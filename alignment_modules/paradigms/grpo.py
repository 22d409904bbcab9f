"""Group relative policy optimization (arXiv:2402.03300) and its variants: sample, judge, compare, update."""

from dataclasses import replace
from time import monotonic
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignment_modules.functional import (
    ADVANTAGE_SCALES,
    KL_ESTIMATORS,
    Surrogate,
    aggregate,
    group_advantages,
    importance_ratio,
    kl_penalty,
    validate_kl_placement,
)
from alignment_modules.functional.checks import check_choice
from alignment_modules.functional.ranges import Count, Finite, NonNegative, Positive, Share, check_options
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.frozen import frozen_companion
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.scoring import Ask
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.rollouts.statistics import sampling_statistics
from alignment_modules.training.acting import ActingModule
from alignment_modules.training.objective import Objective


class GRPOModule(ActingModule):
    r"""Online RL without a critic, on batches of prompts.

    For each prompt G completions are sampled and judged; a completion's advantage is its reward compared with its
    group's. Then `num_iterations * minibatches` optimizer steps follow on these samples, each normalised by the count
    of its own tokens (or sequences) over all micro-batches and ranks.

    Args:
        beta: Strength of the KL penalty against the reference; 0: no reference is held.
        kl_estimator: "k1", "k2", "k3", or "k1+score", "k3+score" (the estimator times the ratio).
        kl_placement: "loss", or "reward" (then only "k1"). Combinations that collapse are refused.
        epsilon: Clip range of the ratio below 1, and above where `epsilon_high` is None.
        epsilon_high: Clip range above 1 (clip-higher); for "cispo" how far above 1 its cap is, 4.0 where None.
        delta: Two-sided clipping: upper bound of the ratio also where the advantage is negative.
        importance_level: "token", or "sequence" (GSPO). The mean stays that of `loss`: "grpo" averages over
            completions, as the GSPO paper does; "dapo" over tokens, so that long completions weigh more.
        num_iterations: Passes over each rollout.
        minibatches: Optimizer steps in a pass.
        loss: "grpo", "dapo", "bnpo", "dr_grpo" or "cispo": the per-token loss and how it is reduced.
        scale_rewards: "group", "batch", "batch_tokens", "none", "leave_one_out" or "mean"; see `group_advantages` for
            the formulas.
        mask_truncated: Leave completions that hit the length limit out of the loss (they stay in their group's mean).
            Completions that no reward applies to are in neither.
        entropy_coef: Weight of the entropy bonus; below 0 it is a penalty.
        reference: What the KL penalty refers to; None: a frozen copy of the policy as it is now (LoRA: adapter off).
        **acting: Keywords of `ActingModule` (rewards, reward_weights, num_generations, max_completion_length,
            temperature, top_p, top_k, min_p, stop_strings, seed), `UpdateModule` (micro_batch_size, max_grad_norm) and
            `AlignmentModule` (policy, optimizer, lr_scheduler, tokenizer, evaluation).

    Raises:
        ValueError: If an option has a value that is not allowed, or options contradict each other.
    """

    paradigm = "grpo"
    bar = ("reward", "completions/mean_length", "groups_with_signal")

    def __init__(
        self,
        *,
        beta: NonNegative = 0.0,
        kl_estimator: str = "k3",
        kl_placement: Literal["loss", "reward"] = "loss",
        epsilon: Share = 0.2,
        epsilon_high: NonNegative | None = None,
        delta: Positive | None = None,
        importance_level: Literal["token", "sequence"] = "token",
        num_iterations: Count = 1,
        minibatches: Count = 1,
        loss: str = "dapo",
        scale_rewards: str = "group",
        mask_truncated: bool = False,
        entropy_coef: Finite = 0.0,
        reference: str | PolicyConfig | nn.Module | None = None,
        **acting: Any,
    ) -> None:
        check_options(GRPOModule.__init__, locals())
        check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
        surrogate = Surrogate(loss, epsilon, epsilon_high, delta, importance_level)
        if acting.get("num_generations") == 1:
            raise ValueError("num_generations=1 must be at least 2: a group's completions are compared with each other")
        if scale_rewards not in ADVANTAGE_SCALES:
            raise ValueError(f"scale_rewards={scale_rewards!r} must be one of {', '.join(ADVANTAGE_SCALES)}")
        if beta == 0 and reference is not None:
            raise ValueError("reference is given but beta=0: without a KL penalty nothing would read it")
        validate_kl_placement(kl_estimator, kl_placement)
        super().__init__(**acting)
        self.beta, self.kl_estimator, self.kl_placement = beta, kl_estimator, kl_placement
        self.surrogate, self.entropy_coef = surrogate, entropy_coef
        self.num_iterations, self.minibatches = num_iterations, minibatches
        self.scale_rewards, self.mask_truncated = scale_rewards, mask_truncated
        self.reference = frozen_companion(reference, self.policy) if beta else None

    @property
    def optimizer_steps_per_batch(self) -> int:
        """Passes over a rollout times the optimizer steps of a pass."""
        return self.num_iterations * self.minibatches

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        """Rolls out, annotates, updates."""
        self.require_trainer()
        started = monotonic()
        self.rollout = self.annotate(self.roll_out(batch))
        self._train_meters.update({"time/rollout": Statistic(torch.tensor(monotonic() - started))})
        parts = self.parts(self.rollout, passes=self.num_iterations, count=self.minibatches, first=batch_idx == 0)
        for number, part in enumerate(parts):
            if not number and "old_logprobs" not in batch:  # the policy is still the one that sampled
                part = replace(part, old_logps=None)
            self.update(part.micro_batches(self.micro_batch_size), part.empty())

    def annotate(self, rollout: Rollout) -> Rollout:
        """Adds log-probabilities of old policy and reference, as far as they will be read, and advantages.

        Completions without a reward, groups with fewer than two with one, and truncated completions where
        `mask_truncated` says so, are left out of the loss.
        """
        rewards, old_logps = rollout.rewards, rollout.old_logps
        in_reward = bool(self.beta) and self.kl_placement == "reward"
        if old_logps is None and (in_reward or self.optimizer_steps_per_batch > 1):
            # What is compared with the reference is computed as it is: equal policies then differ by nothing.
            known = not in_reward and not bool(rollout.sampled_logps.isnan().any())
            old_logps = rollout.sampled_logps if known else self.score_rollout(rollout)
            rollout = replace(rollout, old_logps=old_logps)
        if self.beta:
            reference_logps = self.score_rollout(rollout, self.reference)
            rollout = replace(rollout, reference_logps=reference_logps)
        if in_reward and old_logps is not None:
            own = rollout.own.to(self.device, non_blocking=True)
            divergence = kl_penalty(old_logps, reference_logps, estimator=self.kl_estimator)
            rewards = rewards - self.beta * divergence.masked_fill(~own, 0.0).sum(dim=-1).to(rewards.device)
            self._train_meters.update({"kl": _token_mean(divergence, own)})
        judged = ~rollout.rewards.view(-1, rollout.group).isnan()
        compared = judged & (judged.sum(dim=1, keepdim=True) >= 2)
        trained = rollout.own & compared.view(-1, 1)
        if self.mask_truncated:
            if not self.codec.stop_token_ids:
                raise ValueError(
                    "mask_truncated=True needs a tokenizer: without stop tokens every completion is truncated"
                )
            trained = trained & ~rollout.truncated[:, None]
        advantages = self.advantages(rewards.view(-1, rollout.group), rollout.own.sum(dim=1).view(-1, rollout.group))
        return replace(rollout, trained=trained, advantages=advantages.flatten())

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

    def objective(self, rollout: Rollout) -> Objective:  # type: ignore[override]
        """The clipped policy-gradient loss of a piece of a rollout, summed as the loss's reduction says."""
        given: Any = rollout.advantages
        kl_in_loss, targets = bool(self.beta) and self.kl_placement == "loss", rollout.trained
        if not (kl_in_loss or self.entropy_coef):  # a group without advantage cannot move the policy: it is not run
            targets = (
                targets & (given != 0).view(-1, rollout.group).any(dim=1).repeat_interleave(rollout.group)[:, None]
            )
        ask: list[Ask] = ["entropy"] if torch.is_grad_enabled() and (self.entropy_coef or self.logging_due) else []
        scores = self.score_piece(self.policy, rollout, targets, ask=ask)
        mask, advantages = (values.to(self.device, non_blocking=True) for values in (rollout.trained, given))
        token_logps = scores.token_logps
        old_logps = token_logps.detach() if rollout.old_logps is None else rollout.old_logps
        values = self.surrogate(token_logps, old_logps, advantages, mask)
        statistics = {}
        if kl_in_loss:
            options = {"estimator": self.kl_estimator, "old_token_logps": old_logps}
            divergence = kl_penalty(token_logps, rollout.reference_logps, **options)  # type: ignore[arg-type]
            values = values + self.beta * divergence
            statistics["kl"] = _token_mean(divergence, mask)
        if self.entropy_coef and scores.entropy is not None:
            values = values - self.entropy_coef * scores.entropy
        longest = self.actor.sampling.max_completion_length
        total, weight = aggregate(values, mask, reduction=self.surrogate.reduction, max_length=longest)
        statistics |= {"loss": Statistic(total, weight)}
        if scores.entropy is not None and self.logging_due:
            shares = self.surrogate.statistics(token_logps.detach(), old_logps, advantages, scores.mask)
            statistics |= {name: Statistic(*share) for name, share in shares.items()}  # type: ignore[arg-type]
            if self.kept_ratios is not None:
                level = self.surrogate.importance_level
                ratio = importance_ratio(token_logps.detach(), old_logps, scores.mask, level=level)
                self.kept_ratios.append(ratio[scores.mask])
            statistics["entropy"] = _token_mean(scores.entropy.detach(), scores.mask)
            if rollout.old_logps is None:
                statistics |= sampling_statistics(rollout.sampled_logps, token_logps.detach(), scores.mask)
        return Objective.of(total, weight, statistics)

    def describe(self) -> dict[str, str]:
        """Adds every choice that defines the objective."""
        kl = f"{self.kl_estimator} in the {self.kl_placement}, beta {self.beta}" if self.beta else "none (beta 0)"
        return super().describe() | {
            "loss": self.surrogate.describe(),
            "normaliser": f"{self.surrogate.reduction} over the optimizer step, all micro-batches and ranks",
            "advantages": f"{self.scale_rewards}, {self.actor.num_generations} completions a prompt; 0 where a "
            "group's rewards are equal",
            "KL": kl,
            "updates": f"{self.optimizer_steps_per_batch} a rollout: passes {self.num_iterations}, optimizer steps in "
            f"a pass {self.minibatches}",
        }


def _token_mean(values: Tensor, mask: Tensor) -> Statistic:
    return Statistic(*aggregate(values.detach(), mask, reduction="token_mean"))
