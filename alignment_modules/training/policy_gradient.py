"""What paradigms share that follow the gradient of log-probabilities weighed by advantages: one surrogate, one KL."""

from collections.abc import Mapping
from dataclasses import replace
from time import monotonic
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from alignment_modules.functional import (
    KL_ESTIMATORS,
    Correction,
    Surrogate,
    aggregate,
    aggregate_rows,
    importance_ratio,
    kl_penalty,
    validate_kl_placement,
)
from alignment_modules.functional.checks import check_choice
from alignment_modules.functional.ranges import Count, Finite, NonNegative, Positive, Range, Share, check_options
from alignment_modules.functional.statistics import RowSums, Statistic
from alignment_modules.policies.frozen import frozen_companion
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.scoring import Ask, Scores
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.rollouts.statistics import sampling_statistics
from alignment_modules.training.acting import ActingModule
from alignment_modules.training.controllers import Coefficients, Delta
from alignment_modules.training.objective import Objective
from alignment_modules.training.off_policy import check_sampled, corrected, gate
from alignment_modules.training.selection import mark_covariant, top_entropy


class PolicyGradientModule(ActingModule):
    """Base of paradigms that roll out, give each token an advantage (`credit`), and take steps on the surrogate.

    A rollout is followed by `num_iterations * minibatches` optimizer steps, each normalised by the count of its own
    tokens (or sequences) over all micro-batches and ranks.

    Args:
        beta: Strength of the KL penalty against the reference; 0: no reference is held.
        kl_estimator: "k1", "k2", "k3", or "k1+score", "k3+score" (the estimator times the ratio).
        kl_placement: "loss", or "reward" (then only "k1"). Combinations that collapse are refused.
        epsilon: Clip range of the ratio below 1, and above where `epsilon_high` is None; None: the loss's own, which
            is 0.2 for PPO's (of sequences 3e-4, and 4e-4 above).
        epsilon_high: Clip range above 1 (clip-higher); for "cispo" how far above 1 its cap is, 4.0 where None.
        delta: Two-sided clipping, or dual clip: upper bound of the ratio also where the advantage is negative.
        importance_level: What one ratio spans: "token", "sequence" (GSPO) or "sequence_token" (GSPO-token, for
            advantages by token); None: the loss's own. The mean stays that of `loss`: "grpo" averages over completions,
            as the GSPO paper does; "dapo" over tokens, so that long completions weigh more.
        num_iterations: Passes over each rollout.
        minibatches: Optimizer steps in a pass.
        loss: "grpo", "dapo", "bnpo", "dr_grpo" (PPO's clip, reduced another way), "luspo", "cispo", "sapo", "gmpo",
            "vespo", "dppo_tv", "dppo_kl", "reinforce", "clip_cov" or "kl_cov"; see `policy_gradient_loss`.
        loss_options: Numbers of that loss by name: "sapo": temperature_pos, temperature_neg; "vespo": k_pos,
            lambda_pos, k_neg, lambda_neg; "dppo_tv", "dppo_kl": ratio_cap; "clip_cov": share, covariance_low,
            covariance_high; "kl_cov": share, kl_coef. None: its defaults.
        reduction: "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_mean_token_sum_norm"
            or "prompt_mean"; see `aggregate`. None: the loss's own.
        top_entropy_quantile: Share of a rollout's tokens, those of highest entropy, that the policy gradient is taken
            of (arXiv:2506.01939); the mean is still over all. 1: all.
        correction: How tokens count whose sampled and scored log-probabilities differ: "tis", "tis_sequence", "icepop",
            "mis", "geo_rs", "k3_rs", "opsm", "dppo_tv", "dppo_kl", or a `Correction`. The old policy is then the one at
            the start of the rollout's updates, scored by the trainer, whatever `old_logprobs` a batch brings: these are
            what was sampled with. None: they are the old policy; with an `engine` that computes otherwise than the
            trainer, the one that it needs ("mis").
        entropy_coef: Weight of the entropy bonus; below 0 it is a penalty.
        kl_target: Divergence in nats a token that `beta` is adapted to, from its value on (`KLController`); None: it
            stays.
        kl_horizon: Completions over which `beta` changes by up to a fifth; None: 10,000.
        entropy_target: Entropy in nats a token below which `entropy_coef` grows, and above which there is no bonus
            (`EntropyController`); None: it stays.
        entropy_coef_delta: By how much `entropy_coef` then changes after a rollout; None: 0.005.
        reference: What the KL penalty refers to; None: a frozen copy of the policy as it is now (LoRA: adapter off).
        **acting: Keywords of `ActingModule` (rewards, reward_weights, num_generations, max_completion_length,
            temperature, top_p, top_k, min_p, stop_strings, missing_eos_penalty, seed), `EngineModule` (engine),
            `UpdateModule` (micro_batch_size, max_grad_norm) and `AlignmentModule` (policy, optimizer, lr_scheduler,
            tokenizer, evaluation).

    Raises:
        ValueError: If an option has a value that is not allowed, or options contradict each other.
    """

    mask_truncated: bool = False
    """Whether completions that hit the length limit are left out of the loss."""

    def __init__(
        self,
        *,
        beta: NonNegative = 0.0,
        kl_estimator: str = "k3",
        kl_placement: Literal["loss", "reward"] = "loss",
        epsilon: Share | None = None,
        epsilon_high: NonNegative | None = None,
        delta: Positive | None = None,
        importance_level: Literal["token", "sequence", "sequence_token"] | None = None,
        num_iterations: Count = 1,
        minibatches: Count = 1,
        loss: str = "dapo",
        loss_options: dict[str, float] | None = None,
        reduction: str | None = None,
        top_entropy_quantile: Annotated[float, Range(0, 1, "(]")] = 1.0,
        correction: str | Correction | None = None,
        entropy_coef: Finite = 0.0,
        kl_target: Positive | None = None,
        kl_horizon: Positive | None = None,
        entropy_target: NonNegative | None = None,
        entropy_coef_delta: Delta | None = None,
        reference: str | PolicyConfig | nn.Module | None = None,
        **acting: Any,
    ) -> None:
        check_options(PolicyGradientModule.__init__, locals())
        check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
        surrogate = Surrogate(loss, epsilon, epsilon_high, delta, importance_level, reduction, loss_options)
        correction = gate(correction, surrogate, acting.get("engine"))
        if top_entropy_quantile < 1 and loss == "gmpo":
            raise ValueError(
                f"top_entropy_quantile={top_entropy_quantile} must be 1 with loss='gmpo', a loss of whole completions"
            )
        if beta == 0 and reference is not None:
            raise ValueError("reference is given but beta=0: without a KL penalty nothing would read it")
        validate_kl_placement(kl_estimator, kl_placement)
        coefficients = Coefficients(
            beta,
            entropy_coef,
            kl_target=kl_target,
            kl_horizon=kl_horizon,
            entropy_target=entropy_target,
            entropy_coef_delta=entropy_coef_delta,
        )
        super().__init__(**acting)
        self.beta, self.kl_estimator, self.kl_placement = beta, kl_estimator, kl_placement
        self.surrogate, self.entropy_coef = surrogate, entropy_coef
        self.num_iterations, self.minibatches = num_iterations, minibatches
        self.top_entropy_quantile, self.correction = top_entropy_quantile, correction
        self.coefficients = coefficients
        self.reference = frozen_companion(reference, self.policy) if beta else None

    def extra_state(self) -> dict[str, Any]:
        """Adds the coefficients that are adapted."""
        return super().extra_state() | {"coefficients": self.coefficients.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes them up."""
        super().load_extra_state(state)
        self.coefficients.load_state_dict(state.get("coefficients", {}))

    def credit(self, rollout: Rollout, penalty: Tensor | None) -> Rollout:
        """Adds the advantages, and leaves what has none out of `trained`.

        Args:
            rollout: Of the whole batch on this rank, with the log-probabilities that will be read.
            penalty: [N, T] float32, what the KL takes from the reward of each token; None: nothing.
        """
        raise TypeError(f"{type(self).__name__} does not define credit(rollout, penalty)")

    @property
    def optimizer_steps_per_batch(self) -> int:
        """Passes over a rollout times the optimizer steps of a pass."""
        return self.num_iterations * self.minibatches

    def before_updates(self, pieces: list[Rollout]) -> list[Rollout]:
        """Chooses what a loss treats apart among all tokens of the step."""
        if not self.surrogate.row.selects:
            return pieces
        return mark_covariant(self, self.surrogate, pieces, known=self.correction is None)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        """Rolls out, annotates, updates."""
        self.require_trainer()
        started = monotonic()
        self.rollout = self.annotate(self.roll_out(batch))
        self._train_meters.update({"time/rollout": Statistic(torch.tensor(monotonic() - started))})
        given = "old_logprobs" in batch and not self.rescores_old
        self.learn(self.rollout, given=given, first=batch_idx == 0)

    def learn(self, rollout: Rollout, *, given: bool, first: bool) -> None:
        """All optimizer steps on a rollout.

        Args:
            rollout: What `annotate` made of it.
            given: Whether its old log-probabilities are another policy's.
            first: Whether it is an epoch's first.
        """
        self._train_meters.update(self.coefficients.statistics(self.device))
        parts = self.parts(rollout, passes=self.num_iterations, count=self.minibatches, first=first)
        for number, part in enumerate(parts):
            # The policy is still the one that sampled.
            if not number and not given and not self.surrogate.row.of_sampler:
                part = replace(part, old_logps=None)
            self.step(part)
        self.coefficients.step(self.reduce, len(rollout.ids), self.device)

    def step(self, part: Rollout) -> None:
        """One optimizer step on a minibatch of a rollout."""
        self.update(part.micro_batches(self.micro_batch_size), part.empty())

    def annotate(self, rollout: Rollout) -> Rollout:
        """Adds log-probabilities of old policy and reference, as far as they will be read, and what `credit` does.

        Completions without a reward, and truncated ones where `mask_truncated` says so, are left out of the loss.
        """
        self.coefficients.begin()
        rollout, penalty, entropies = self._with_log_probs(rollout)
        trained = rollout.own & ~rollout.rewards.isnan().cpu()[:, None]
        if self.mask_truncated:
            self.require_stops("mask_truncated=True")
            trained = trained & ~rollout.truncated[:, None]
        rollout = self.credit(replace(rollout, trained=trained), penalty)
        if self.surrogate.reduced_by == "prompt_mean":  # micro-batches may cut a prompt's completions apart
            counts = rollout.trained.sum(dim=1).view(-1, rollout.group).sum(dim=1).repeat_interleave(rollout.group)
            rollout = replace(rollout, prompt_tokens=counts.to(self.device))
        if entropies is not None:
            weights = top_entropy(self, rollout, entropies, self.top_entropy_quantile)
            rollout = replace(rollout, weights=weights)
        return rollout

    @property
    def rescores_old(self) -> bool:
        """Whether the old policy is scored, because what was sampled with may differ from it."""
        return self.correction is not None and self.correction.against == "old"

    def _with_log_probs(self, rollout: Rollout) -> tuple[Rollout, Tensor | None, Tensor | None]:
        """Adds those of old policy and reference that will be read.

        Also says what the KL takes from each token's reward, and the entropies where these are read.
        """
        in_reward, penalty, entropies = bool(self.beta) and self.kl_placement == "reward", None, None
        of_sampler, sampled = self.surrogate.row.of_sampler, rollout.sampled_logps
        check_sampled(rollout, self.surrogate, self.correction, updates=self.optimizer_steps_per_batch)
        now = whole = None if self.rescores_old else rollout.old_logps
        if asked := self.asked_at_start():
            scores = self.scores_of(rollout, ask=[*asked, "full_logps"] if in_reward else asked)
            rollout, entropies = self.with_scores(rollout, scores), scores.entropy
            now, whole = (scores.token_logps, scores.full_logps) if now is None else (now, whole)
        if whole is None and in_reward:
            # What is compared with the reference is computed as it is: equal policies then differ by nothing.
            whole = self.score_rollout(rollout, over_support=False)
            now = whole if rollout.support is None else None
        if now is None and self.optimizer_steps_per_batch > 1 and not of_sampler:
            known = not self.rescores_old and not bool(sampled.isnan().any())
            now = sampled if known else self.score_rollout(rollout)
        rollout = replace(rollout, old_logps=sampled if of_sampler else now)
        if self.beta:
            reference_logps = self.score_rollout(rollout, self.reference)
            rollout = replace(rollout, reference_logps=reference_logps)
        if in_reward and whole is not None:
            own = rollout.own.to(self.device, non_blocking=True)
            divergence = kl_penalty(whole, reference_logps, estimator=self.kl_estimator)
            penalty = self.coefficients.kl * divergence.masked_fill(~own, 0.0)
            self._train_meters.update({"kl": self.coefficients.measure("kl", token_mean(divergence, own))})
        return rollout, penalty, entropies

    def asked_at_start(self) -> list[Ask]:
        """What is read of the policy as it is before a rollout's updates, beside log-probabilities."""
        return ["entropy"] if self.top_entropy_quantile < 1 else []

    def with_scores(self, rollout: Rollout, scores: Scores) -> Rollout:
        """Keeps what `asked_at_start` asked for, beside entropies, in a rollout."""
        return rollout

    def require_stops(self, option: str) -> None:
        """Refuses an option that tells truncated completions from others where nothing else stops one.

        Raises:
            ValueError: If there are no stop tokens.
        """
        if not self.codec.stop_token_ids and not self.actor.sampling.stop_strings:
            raise ValueError(f"{option} needs a tokenizer: without stop tokens every completion is truncated")

    def objective(self, rollout: Rollout) -> Objective:  # type: ignore[override]
        """The surrogate of a piece of a rollout, summed as the loss's reduction says."""
        scores = self.score_piece(self.policy, rollout, self.targets(rollout), ask=self.asked())
        return self.policy_objective(rollout, scores)

    def targets(self, rollout: Rollout) -> Tensor:
        """[N, T] bool, on the host: the trained tokens of a piece that can move the policy."""
        in_loss = self.beta and self.kl_placement == "loss"
        if in_loss or self.coefficients.entropy is not None or self.surrogate.loss == "kl_cov":
            return rollout.trained
        given: Any = rollout.advantages
        rows = given != 0 if given.dim() == 1 else (given != 0).any(dim=1)
        moves = rows.view(-1, rollout.group).any(dim=1)  # a group without advantage is not run
        return rollout.trained & moves.repeat_interleave(rollout.group).to(rollout.trained.device)[:, None]

    def asked(self) -> list[Ask]:
        """What `policy_objective` reads of the scores beside the log-probabilities."""
        ask: list[Ask] = ["full_logps"] if self.beta and self.kl_placement == "loss" else []
        wanted = self.coefficients.entropy is not None or self.logging_due
        return [*ask, "entropy"] if torch.is_grad_enabled() and wanted else ask

    def policy_objective(self, rollout: Rollout, scores: Scores) -> Objective:
        """The surrogate, the KL in the loss and the entropy bonus of a piece whose `targets` were scored."""
        given: Any = rollout.advantages
        mask, advantages = (values.to(self.device, non_blocking=True) for values in (rollout.trained, given))
        token_logps = scores.token_logps
        old_logps = token_logps.detach() if rollout.old_logps is None else rollout.old_logps
        values = self.surrogate(token_logps, old_logps, advantages, mask, rollout.covariant)
        statistics: dict[str, Statistic] = {}
        if rollout.weights is not None:
            values = values * rollout.weights
        if self.correction is not None:
            scored = old_logps if self.rescores_old else token_logps.detach()
            values, told = corrected(values, self.correction, rollout, scored, mask, scores.mask)
            statistics |= told
        if self.beta and self.kl_placement == "loss":
            divergence = kl_penalty(
                scores.full_logps,  # type: ignore[arg-type]
                rollout.reference_logps,  # type: ignore[arg-type]
                estimator=self.kl_estimator,
                old_token_logps=old_logps,
                ratio_token_logps=token_logps,
            )
            values = values + self.coefficients.kl * divergence
            statistics["kl"] = self.coefficients.measure("kl", token_mean(divergence, mask))
        bonus = self.coefficients.entropy
        if bonus is not None and scores.entropy is not None:
            values = values - bonus * scores.entropy
            self.coefficients.measure("entropy", token_mean(scores.entropy, mask))
        if scores.entropy is not None and self.logging_due:
            statistics |= self._looked_at(rollout, scores, old_logps, advantages)
        return Objective.of_rows(*self.reduced(values, mask, rollout), statistics)

    def reduced(self, values: Tensor, mask: Tensor, rollout: Rollout) -> RowSums:
        """The sums over the completions of a piece of a rollout, as the loss's reduction says, and their units.

        Args:
            values: [N, T].
            mask: [N, T] bool: the trained tokens.
            rollout: The piece.
        """
        reduction, longest = self.surrogate.reduced_by, self.actor.sampling.max_completion_length
        tokens = rollout.prompt_tokens
        return aggregate_rows(values, mask, reduction=reduction, max_length=longest, prompt_tokens=tokens)

    def describe(self) -> dict[str, str]:
        """Adds every choice that defines the objective."""
        kl = f"{self.kl_estimator} in the {self.kl_placement}, beta {self.beta}" if self.beta else "none (beta 0)"
        more = {} if self.correction is None else {"correction": self.correction.describe()}
        if self.top_entropy_quantile < 1:
            more["tokens"] = f"the {self.top_entropy_quantile:g} of highest entropy in the rollout, on all ranks"
        entropy = {"entropy": f"weight {self.entropy_coef:g}{self.coefficients.describe('entropy')}"}
        return super().describe() | {
            "loss": self.surrogate.describe(),
            **more,
            "normaliser": f"{self.surrogate.reduced_by} over the optimizer step, all micro-batches and ranks",
            "KL": kl + self.coefficients.describe("kl"),
            **(entropy if self.coefficients.entropy is not None else {}),
            "updates": f"{self.optimizer_steps_per_batch} a rollout: passes {self.num_iterations}, optimizer steps in "
            f"a pass {self.minibatches}",
        }

    def _looked_at(
        self, rollout: Rollout, scores: Scores, old_logps: Tensor, advantages: Tensor
    ) -> Mapping[str, Statistic]:
        """What is logged of ratios, entropy and the agreement of sampling and scoring."""
        token_logps, mask = scores.token_logps.detach(), scores.mask
        shares = self.surrogate.statistics(token_logps, old_logps, advantages, mask)
        found = {name: Statistic(*share) for name, share in shares.items()}  # type: ignore[arg-type]
        if self.kept_ratios is not None:
            ratio = importance_ratio(token_logps, old_logps, mask, level=self.surrogate.level)
            self.kept_ratios.append(ratio[mask])
        if scores.entropy is not None:
            found["entropy"] = token_mean(scores.entropy, mask)
        if rollout.old_logps is None or self.rescores_old:
            found |= sampling_statistics(rollout.sampled_logps, old_logps, mask)
        return found


def token_mean(values: Tensor, mask: Tensor) -> Statistic:
    """The mean over the tokens of a mask, without gradient: `[batch, time]` both."""
    return Statistic(*aggregate(values.detach(), mask, reduction="token_mean"))
