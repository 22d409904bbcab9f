"""Online DPO (arXiv:2402.04792): the policy writes two completions of a prompt, rewards say which is the better."""

from dataclasses import replace
from time import monotonic
from typing import Annotated, Any, Literal

import torch
from torch import nn

from alignment_modules.functional import Preference, sequence_logps
from alignment_modules.functional.ranges import Count, Positive, Range, check_options
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.frozen import frozen_companion
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.scoring import Ask
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.rollouts.statistics import sampling_statistics
from alignment_modules.training.acting import ActingModule
from alignment_modules.training.objective import Objective
from alignment_modules.training.pairs import ScoredPairs, best_and_worst

OnlineLoss = Literal["sigmoid", "ipo", "hinge"]


class OnlineDPOModule(ActingModule):
    r"""Direct preference optimization on the policy's own completions, on batches of prompts.

    For each prompt `num_generations` completions are sampled and judged; the best is the chosen one of a pair, the
    worst the rejected one. A prompt whose completions are as good (the rewards differ by less than 1e-6) or of which
    fewer than two are judged makes no pair. With `h` the difference of the log-ratios of policy and reference, the
    default loss is `-log sigmoid(beta * h)`, averaged over the pairs of the whole optimizer step. Both models are
    scored at the temperature that was sampled with: what is compared is the policy that wrote.

    Args:
        reference: What the policy is held to: a folder, a `PolicyConfig` or a module. None: a frozen copy of the policy
            as it is now, or, for a LoRA policy, the policy with its adapter switched off.
        beta: Strength of the pull to the reference (`tau` for "ipo").
        loss: "sigmoid" (DPO), "ipo" or "hinge" (SLiC); see `preference_loss`.
        ipo_logps: Whether "ipo" compares the "mean" over tokens (as its authors' corrected code does) or the "sum".
        num_generations: Completions of each prompt, of which two make the pair.
        num_iterations: Passes over each rollout.
        minibatches: Optimizer steps in a pass.
        **acting: Keywords of `ActingModule` (rewards, reward_weights, max_completion_length, temperature, top_p, top_k,
            min_p, stop_strings, missing_eos_penalty, seed), `EngineModule` (engine), `UpdateModule` (micro_batch_size,
            at least 2, and max_grad_norm) and `AlignmentModule` (policy, optimizer, lr_scheduler, tokenizer,
            evaluation).

    Raises:
        ValueError: If an option has a value that is not allowed, or options contradict each other.
    """

    paradigm = "online_dpo"
    bar = ("reward", "rewards/margins", "ties")
    fewest_completions = 2

    def __init__(
        self,
        *,
        reference: str | PolicyConfig | nn.Module | None = None,
        beta: Positive = 0.1,
        loss: OnlineLoss = "sigmoid",
        ipo_logps: Literal["mean", "sum"] = "mean",
        num_generations: Annotated[int, Range(2)] = 2,
        num_iterations: Count = 1,
        minibatches: Count = 1,
        **acting: Any,
    ) -> None:
        check_options(OnlineDPOModule.__init__, locals())
        preference = Preference(loss, beta, ipo_logps=ipo_logps)
        if acting.get("micro_batch_size") == 1:
            raise ValueError("micro_batch_size=1 must be at least 2: a pair's completions are compared in one pass")
        super().__init__(num_generations=num_generations, **acting)
        self.preference = preference
        self.num_iterations, self.minibatches = num_iterations, minibatches
        self.reference = frozen_companion(reference, self.policy)

    @property
    def optimizer_steps_per_batch(self) -> int:
        """Passes over a rollout times the optimizer steps of a pass."""
        return self.num_iterations * self.minibatches

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        """Rolls out, pairs, updates."""
        self.require_trainer()
        started = monotonic()
        pairs = self.pair(self.roll_out(batch))
        self._train_meters.update({"time/rollout": Statistic(torch.tensor(monotonic() - started))})
        for part in self.parts(pairs, passes=self.num_iterations, count=self.minibatches, first=batch_idx == 0):
            self.update(part.micro_batches(self.micro_batch_size), part.empty())

    def pair(self, rollout: Rollout) -> Rollout:
        """The rollout's pairs, a group of two each, chosen first, with the reference's log-probabilities.

        A prompt that makes no pair stays, without a trained token. It is neither scored nor counted.
        """
        rewards = rollout.rewards.view(-1, rollout.group)
        places, differ = best_and_worst(rewards)
        judged = (~rewards.isnan()).sum(dim=1) >= 2
        margins = rewards.gather(1, places).diff(dim=1).neg()[:, 0]
        self._train_meters.update(
            {
                "ties": Statistic((judged & ~differ).sum(), judged.sum()),
                "objective/scores": Statistic(rewards.nansum(), (~rewards.isnan()).sum()),
                "objective/scores_margin": Statistic(margins[judged].sum(), judged.sum()),
            }
        )
        if int(self.reduce(judged.any().to(self.device, torch.float32), "max")):
            self.window.learnt = True  # a step of ties moves nothing, but nothing is wrong with its data
        pairs = rollout.select(slice(None), places)
        written = pairs.own.any(dim=1).view(-1, 2).all(dim=1)
        pairs = replace(pairs, trained=pairs.own & (differ & written).repeat_interleave(2)[:, None])
        return replace(pairs, reference_logps=self.score_rollout(pairs, self.reference, trained_only=True))

    def objective(self, rollout: Rollout) -> Objective:  # type: ignore[override]
        """The preference loss of a piece of the pairs, summed over them."""
        ask: list[Ask] = ["full_logps"]  # as of the reference, which did not sample
        ask += ["entropy", "accuracy"] if torch.is_grad_enabled() and self.logging_due else []
        scores = self.score_piece(self.policy, rollout, rollout.trained, ask=ask)
        pairs = ScoredPairs.of(replace(scores, token_logps=scores.full_logps))  # type: ignore[arg-type]
        reference_logps = sequence_logps(rollout.reference_logps).view(-1, 2)  # type: ignore[arg-type]
        lengths = dict(zip(("chosen_lengths", "rejected_lengths"), pairs.lengths.unbind(1), strict=True))
        losses = self.preference(*pairs.logps.unbind(1), *reference_logps.unbind(1), **lengths)
        log_ratios = pairs.logps.detach() - reference_logps
        implicit = log_ratios / pairs.lengths.clamp(min=1) if self.preference.normalised else log_ratios
        scored = rollout.rewards.nan_to_num().view(-1, 2).to(log_ratios)
        objective = pairs.objective(
            losses,
            self.preference.beta * implicit,
            {
                "objective/kl": log_ratios.mean(dim=1),
                "objective/entropy": -pairs.logps.mean(dim=1),
                "objective/non_score_reward": -self.preference.beta * log_ratios.mean(dim=1),
                "objective/rlhf_reward": (scored - self.preference.beta * log_ratios).mean(dim=1),
            },
        )
        if self.logging_due and self.optimizer_steps_per_batch == 1:
            objective.statistics.update(
                sampling_statistics(rollout.sampled_logps, scores.token_logps.detach(), scores.mask)
            )
        return objective

    def describe(self) -> dict[str, str]:
        """Adds the loss, its normaliser and how pairs are made."""
        options = self.preference
        of = f" of {options.ipo_logps}s over tokens" * (options.loss == "ipo")
        return super().describe() | {
            "loss": f"{options.loss}{of}, beta {options.beta}",
            "normaliser": "pairs of the optimizer step, over all micro-batches and ranks",
            "pairs": f"the best and the worst of {self.actor.num_generations} completions a prompt; none where their "
            "rewards are equal",
            "updates": f"{self.optimizer_steps_per_batch} a rollout: passes {self.num_iterations}, optimizer steps in "
            f"a pass {self.minibatches}",
        }
