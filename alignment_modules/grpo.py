"""Group relative policy optimization (arXiv:2402.03300) and its variants: sample, judge, compare, update."""

from collections.abc import Mapping
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
    kl_penalty,
    validate_kl_placement,
)
from alignment_modules.functional.checks import check_choice
from alignment_modules.functional.ranges import Count, Finite, NonNegative, Positive, Share, check_options
from alignment_modules.objective import EarlyRead, Objective, Statistic
from alignment_modules.online import OnlineModule
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.reference import build_reference, reference_mode
from alignment_modules.policies.scoring import Scores, score
from alignment_modules.policies.segments import Segments
from alignment_modules.rewards import RewardError
from alignment_modules.rollouts import NonFiniteLogits
from alignment_modules.rollouts.rollout import Rollout


class GRPOModule(OnlineModule):
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
        micro_batch_size: Completions in one forward and backward pass; None: a whole minibatch.
        loss: "grpo", "dapo", "bnpo", "dr_grpo" or "cispo": the per-token loss and how it is reduced.
        scale_rewards: "group", "batch", "batch_tokens", "none", "leave_one_out" or "mean"; see `group_advantages` for
            the formulas.
        mask_truncated: Leave completions that hit the length limit out of the loss (they stay in their group's mean).
            Completions that no reward applies to are in neither.
        entropy_coef: Weight of the entropy bonus; below 0 it is a penalty.
        reference: What the KL penalty refers to; None: a frozen copy of the policy as it is now (LoRA: adapter off).
        **online: Keywords of `OnlineModule` (rewards, reward_weights, num_generations, max_completion_length,
            temperature, top_p, top_k, min_p, stop_strings, seed), `UpdateModule` (max_grad_norm) and
            `AlignmentModule` (policy, optimizer, lr_scheduler, tokenizer, evaluation).

    Raises:
        ValueError: If an option has a value that is not allowed, or options contradict each other.
    """

    paradigm = "grpo"
    bar = ("reward", "completions/mean_length")

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
        micro_batch_size: Count | None = None,
        loss: str = "dapo",
        scale_rewards: str = "group",
        mask_truncated: bool = False,
        entropy_coef: Finite = 0.0,
        reference: str | PolicyConfig | nn.Module | None = None,
        **online: Any,
    ) -> None:
        check_options(GRPOModule.__init__, locals())
        check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
        surrogate = Surrogate(loss, epsilon, epsilon_high, delta, importance_level)
        if online.get("num_generations") == 1:
            raise ValueError("num_generations=1 must be at least 2: a group's completions are compared with each other")
        if scale_rewards not in ADVANTAGE_SCALES:
            raise ValueError(f"scale_rewards={scale_rewards!r} must be one of {', '.join(ADVANTAGE_SCALES)}")
        if beta == 0 and reference is not None:
            raise ValueError("reference is given but beta=0: without a KL penalty nothing would read it")
        validate_kl_placement(kl_estimator, kl_placement)
        super().__init__(**online)
        self.beta, self.kl_estimator, self.kl_placement = beta, kl_estimator, kl_placement
        self.surrogate, self.entropy_coef = surrogate, entropy_coef
        self.num_iterations, self.minibatches, self.micro_batch_size = num_iterations, minibatches, micro_batch_size
        self.scale_rewards, self.mask_truncated = scale_rewards, mask_truncated
        self.reference = build_reference(reference, self.policy) if beta else None
        self._finite: Tensor | bool = True
        self._early_finite = EarlyRead(True)

    @property
    def optimizer_steps_per_batch(self) -> int:
        """Passes over a rollout times the optimizer steps of a pass."""
        return self.num_iterations * self.minibatches

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        """Samples and judges, then updates the policy on these samples."""
        self.require_trainer()
        started = monotonic()
        self._finite = True
        rollout = self.roll_out(batch)
        self._train_meters.update({"time/rollout": Statistic(torch.tensor(monotonic() - started))})
        order = torch.Generator().manual_seed(self.seed + self.global_step)
        largest = int(self.reduce(torch.tensor(len(rollout), device=self.device), "max"))
        if batch_idx == 0 and largest < self.minibatches:
            raise ValueError(f"minibatches={self.minibatches} is more than the {largest} prompts of a batch")
        for _ in range(self.num_iterations):
            for number, part in enumerate(rollout.minibatches(self.minibatches, order)):
                if number >= largest:  # a last, shorter batch: no rank has anything left
                    break
                if self.trainer.max_steps != -1 and self.global_step >= self.trainer.max_steps:
                    self.batch_cut_short = True
                    return
                minibatch = replace(part, on_policy=rollout.on_policy)
                self.update(minibatch.micro_batches(self.micro_batch_size), minibatch.empty())
                rollout = replace(rollout, on_policy=False)

    @torch.no_grad()
    def roll_out(self, batch: dict[str, Any]) -> Rollout:
        """Completions of the batch's prompts with their advantages, old and reference log-probabilities.

        Completions without a reward, and groups with fewer than two with one, are left out of the loss.

        Raises:
            RewardError: If no completion of any rank has a reward.
        """
        completions = self.sample_completions(batch)
        rewards, statistics = self.judge_completions(batch, completions)
        statistics |= _group_statistics(rewards)
        prompts, group = rewards.shape
        judged = ~rewards.isnan()
        if not int(self.reduce(judged.sum(), "max")):
            given = isinstance(batch.get("rewards"), Tensor)
            whose = "the batch's rewards are" if given else f"{', '.join(map(repr, self.rewards.names))} gave"
            raise RewardError(f"{self.this_step} has nothing to learn from: {whose} None or NaN for all completions")
        compared = judged & (judged.sum(dim=1, keepdim=True) >= 2)
        mask = completions.mask.view(prompts, group, -1)
        if self.mask_truncated and not self.stop_token_ids():
            raise ValueError("mask_truncated=True needs a tokenizer: without stop tokens every completion is truncated")
        loss_mask = mask & ~completions.truncated.view(prompts, group, 1) if self.mask_truncated else mask
        # Nothing predicts the first token after an empty prompt.
        unpredicted = (mask.cumsum(dim=-1) == 1) & ~batch["prompt_attention_mask"].bool().any(dim=1)[:, None, None]
        rollout = Rollout(
            prompt_ids=batch["prompts"],
            prompt_mask=batch["prompt_attention_mask"].bool(),
            completion_ids=completions.ids.view(prompts, group, -1),
            completion_mask=mask,
            loss_mask=loss_mask & ~unpredicted & compared[..., None],
            advantages=rewards,
            old_logps=completions.token_logps.view(prompts, group, -1),
            on_policy="old_logprobs" not in batch,
        )
        read_later = self.optimizer_steps_per_batch > 1 or self.kl_placement == "reward"
        if "responses" in batch and rollout.on_policy and read_later:
            rollout = replace(rollout, old_logps=self._score_rollout(rollout, reference=False))
        if self.beta:
            reference_logps = self._score_rollout(rollout, reference=True)
            rollout = replace(rollout, reference_logps=reference_logps)
            if self.kl_placement == "reward":
                divergence = kl_penalty(rollout.old_logps, reference_logps, estimator=self.kl_estimator)
                rewards = rewards - self.beta * divergence.masked_fill(~mask, 0.0).sum(dim=-1)
                statistics["kl"] = _token_mean(divergence.flatten(0, 1), mask.flatten(0, 1))
        advantages = self.advantages(rewards)
        self.last_rollout["advantage"] = advantages.flatten().tolist()
        self._train_meters.update(statistics)
        self.count_rollout(batch, completions)
        return replace(rollout, advantages=advantages)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantages [prompts, G] of rewards [prompts, G], 0 where NaN; scaling by the batch spans all ranks."""
        if self.scale_rewards == "batch" and self.trainer.world_size > 1:
            gathered = self.all_gather_ragged(rewards)
            start = sum(len(part) for part in gathered[: self.global_rank])
            return group_advantages(torch.cat(gathered), scale="batch")[start : start + len(rewards)]
        return group_advantages(rewards, scale=self.scale_rewards)

    def objective(self, rollout: Rollout) -> Objective:  # type: ignore[override]
        """The clipped policy-gradient loss of a piece of a rollout, summed as the loss's reduction says."""
        scores = self._score_active(rollout)
        token_logps = scores.token_logps
        self._finite = self._finite & torch.where(scores.mask, token_logps.detach(), 0.0).isfinite().all()
        self._early_finite = EarlyRead(self._finite)
        mask, advantages = rollout.loss_mask.flatten(0, 1), rollout.advantages.flatten()
        old_logps = token_logps.detach() if rollout.on_policy else rollout.old_logps.flatten(0, 1)
        values = self.surrogate(token_logps, old_logps, advantages, mask)
        statistics = {}
        if self.beta and self.kl_placement == "loss":
            reference_logps = rollout.reference_logps.flatten(0, 1)  # type: ignore[union-attr]
            divergence = kl_penalty(
                token_logps, reference_logps, estimator=self.kl_estimator, old_token_logps=old_logps
            )
            values = values + self.beta * divergence
            statistics["kl"] = _token_mean(divergence, mask)
        if self.entropy_coef and scores.entropy is not None:
            values = values - self.entropy_coef * scores.entropy
        total, weight = aggregate(
            values, mask, reduction=self.surrogate.reduction, max_length=self.sampling.max_completion_length
        )
        statistics |= {"loss": Statistic(total, weight)}
        if scores.entropy is not None and self.logging_due:
            shares = self.surrogate.statistics(token_logps.detach(), old_logps, advantages, scores.mask)
            statistics |= {name: Statistic(*share) for name, share in shares.items()}  # type: ignore[arg-type]
            statistics["entropy"] = _token_mean(scores.entropy.detach(), scores.mask)
            if rollout.on_policy:  # how far decoding and scoring disagree; NaN where the batch brought the responses
                difference = (rollout.old_logps.flatten(0, 1) - token_logps.detach()).abs()
                known = scores.mask & ~difference.isnan()
                statistics["sampling/sampling_logp_difference/mean"] = _token_mean(difference.nan_to_num(), known)
                largest = torch.where(known, difference, -torch.inf).flatten()
                statistics["sampling/sampling_logp_difference/max"] = Statistic(
                    torch.cat([largest, largest.new_full((1,), -torch.inf)]).max(), kind="max"
                )
        return Objective.of(total, weight, statistics)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Also refuses to step on log-probabilities that are not finite.

        Raises:
            NonFiniteLogits: If a piece of the step had some; it names the step.
        """
        if not self._early_finite.item():
            raise NonFiniteLogits(_not_finite(self.this_step, "policy"))
        super().on_before_optimizer_step(optimizer)

    def publish(
        self, values: Mapping[str, float], stage: Literal["train", "val", "test"], step: int | None = None
    ) -> None:
        """Also shows the share of groups whose rewards differ: the others teach nothing."""
        super().publish(values, stage, step)
        if stage == "train" and "frac_reward_zero_std" in values:
            signal = 1.0 - values["frac_reward_zero_std"]
            self.log("train/groups_with_signal", signal, prog_bar=True, logger=False, batch_size=1)

    def describe(self) -> dict[str, str]:
        """Adds every choice that defines the objective."""
        sampling = self.sampling
        kl = f"{self.kl_estimator} in the {self.kl_placement}, beta {self.beta}" if self.beta else "none (beta 0)"
        return super().describe() | {
            "loss": self.surrogate.describe(),
            "normaliser": f"{self.surrogate.reduction} over the optimizer step, all micro-batches and ranks",
            "advantages": f"{self.scale_rewards}, {self.num_generations} completions a prompt; 0 where a "
            "group's rewards are equal",
            "rewards": ", ".join(self.rewards.names),
            "KL": kl,
            "sampling": f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}, "
            f"min_p {sampling.min_p:g}, at most {sampling.max_completion_length} tokens, seed {self.seed}",
            "updates": f"{self.optimizer_steps_per_batch} a rollout: passes {self.num_iterations}, optimizer steps in "
            f"a pass {self.minibatches}",
        }

    def _score_active(self, rollout: Rollout) -> Scores:
        """Scores [P * G, T] of a piece; groups that cannot move the policy are left out of the forward pass."""
        if self.entropy_coef or (self.beta and self.kl_placement == "loss"):
            return self._score(self.policy, rollout)
        active = (rollout.advantages != 0).any(dim=1)
        if bool(active.all()):
            return self._score(self.policy, rollout)
        scores, shape = self._score(self.policy, rollout.select(active)), rollout.loss_mask.shape

        def spread(values: Tensor, rest: Tensor) -> Tensor:
            return rest.index_put((active,), values.view(-1, *shape[1:])).flatten(0, 1)

        # The others' advantage is 0; a ratio of 1 keeps the arithmetic finite.
        unscored = torch.zeros_like(rollout.old_logps, dtype=scores.token_logps.dtype)
        return Scores(
            token_logps=spread(
                scores.token_logps, unscored if rollout.on_policy else rollout.old_logps.to(unscored).nan_to_num()
            ),
            mask=spread(scores.mask, torch.zeros_like(rollout.loss_mask)),
            entropy=None if scores.entropy is None else spread(scores.entropy, unscored),
        )

    def _score_rollout(self, rollout: Rollout, *, reference: bool) -> Tensor:
        """Log-probabilities [P, G, T] of a whole rollout without a graph, in micro-batches."""
        results = torch.zeros_like(rollout.completion_mask, dtype=torch.float32)
        size = max((self.micro_batch_size or results.shape[0] * results.shape[1]) // results.shape[1], 1)
        with reference_mode(self.policy, self.reference if reference else self.policy) as model:
            for start in range(0, len(rollout), size):
                piece = rollout.select(slice(start, start + size))
                scored = self._score(model, piece).token_logps
                results[start : start + size] = scored.view(results[start : start + size].shape)
        if not bool(results.isfinite().all()):
            raise NonFiniteLogits(_not_finite(self.this_step, "reference" if reference else "policy"))
        return results

    def _score(self, model: nn.Module, rollout: Rollout) -> Scores:
        segments = Segments.from_prompts(
            rollout.prompt_ids,
            rollout.prompt_mask,
            rollout.completion_ids.flatten(0, 1),
            rollout.completion_mask.flatten(0, 1),
            rollout.loss_mask.flatten(0, 1),
        )
        details = torch.is_grad_enabled() and (bool(self.entropy_coef) or self.logging_due)
        return score(model, segments, temperature=self.sampling.temperature, ask=["entropy"] if details else [])


def _group_statistics(rewards: Tensor) -> dict[str, Statistic]:
    """Mean and spread of the groups' rewards; NaN stands for a reward that does not apply."""
    applies = ~rewards.isnan()
    count = applies.sum(dim=1)
    mean = rewards.nansum(dim=1) / count.clamp(min=1)
    squares = torch.where(applies, (rewards - mean[:, None]).square(), 0.0).sum(dim=1)
    largest = torch.where(applies, rewards, -torch.inf).amax(dim=1)
    smallest = torch.where(applies, rewards, torch.inf).amin(dim=1)
    groups = (count > 0).sum()
    return {
        "reward": Statistic(mean.sum(), groups),
        "reward_std": Statistic((squares / (count - 1).clamp(min=1)).sqrt().sum(), groups),
        "frac_reward_zero_std": Statistic(((largest - smallest < 1e-6) & (count > 0)).sum(), groups),
    }


def _not_finite(step: str, who: str) -> str:
    return f"{step}: {who} gave logits that are not finite; its weights or inputs may hold NaN or infinity."


def _token_mean(values: Tensor, mask: Tensor) -> Statistic:
    total, weight = aggregate(values.detach(), mask, reduction="token_mean")
    return Statistic(total, weight)
