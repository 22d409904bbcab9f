"""Proximal policy optimization (arXiv:1707.06347) with a critic: sample, judge, value each token, learn."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from alignment_modules.functional import (
    aggregate_rows,
    generalized_advantages,
    length_adaptive_lambda,
    token_rewards,
    turn_starts,
    whiten,
)
from alignment_modules.functional.ranges import Count, NonNegative, Positive, Share, check_options
from alignment_modules.policies.scoring import Scores
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.actor_critic import ActorCriticModule
from alignment_modules.training.objective import Objective, Term
from alignment_modules.training.ppo_statistics import rollout_statistics, update_statistics
from alignment_modules.training.running_scale import RunningScale

LAM = 0.95


class PPOModule(ActorCriticModule):
    r"""Online RL with a critic, on batches of prompts.

    The reward of a token is `-beta * k1`, and the completion's score on its last one. Advantages and returns are those
    of generalized advantage estimation over the policy's own tokens (arXiv:1506.02438), from the same rewards and
    values with a lambda each (arXiv:2503.01491). Then `num_iterations * minibatches` optimizer steps of critic and
    policy follow on these samples, each normalised by its own tokens over all micro-batches and ranks.

    Args:
        gamma: Discount of a step in time.
        lam: Lambda of the policy's advantages.
        critic_lam: Lambda of the returns that the critic learns; 1: Monte-Carlo returns.
        length_adaptive_alpha: In place of `lam`, `1 - 1 / max(alpha * length, 1)` of each completion (VAPO,
            arXiv:2504.05118, takes 0.05: one-step TD up to 20 tokens); None: `lam`.
        gae_unit: What a step in time is: a "token", or a "turn", a run of the policy's tokens between others' tokens.
        whiten_advantages: Whether a rollout's advantages get mean 0 and sample deviation 1 (ddof 1) over the trained
            tokens of all ranks; after the returns were made of them.
        truncation: Completions that hit the length limit: "none", they end there; "bootstrap", the critic's value of
            their last state stands for what would have followed; "mask", neither policy nor critic learns from them.
        reward_clip: Rewards are held within plus and minus this; None: they are not.
        normalize_rewards: Whether rewards are divided by the deviation of all rewards so far, before they are clipped.
        positive_nll_coef: Weight of the negative log-likelihood of completions with a reward above 0, averaged over
            their tokens in the step (VAPO takes 0.1).
        beta: Strength of the KL penalty against the reference; 0: no reference is held.
        kl_estimator: As in `PolicyGradientModule`; in the reward only "k1".
        kl_placement: "reward" or "loss".
        num_generations: Completions of each prompt.
        **actor_critic: Keywords of `ActorCriticModule` (critic, critic_optimizer, critic_lr_scheduler,
            critic_pretrain_steps, value_clip, value_coef), `PolicyGradientModule`, `ActingModule`, `EngineModule`,
            `UpdateModule` and `AlignmentModule`.

    Raises:
        ValueError: If an option has a value that is not allowed, or options contradict each other.
    """

    paradigm = "ppo"
    bar = ("reward", "completions/mean_length", "critic/explained_variance")

    def __init__(
        self,
        *,
        gamma: Share = 1.0,
        lam: Share = LAM,
        critic_lam: Share = 1.0,
        length_adaptive_alpha: Positive | None = None,
        gae_unit: Literal["token", "turn"] = "token",
        whiten_advantages: bool = True,
        truncation: Literal["none", "bootstrap", "mask"] = "none",
        reward_clip: Positive | None = None,
        normalize_rewards: bool = False,
        positive_nll_coef: NonNegative = 0.0,
        beta: NonNegative = 0.05,
        kl_estimator: str = "k1",
        kl_placement: Literal["reward", "loss"] = "reward",
        num_generations: Count = 1,
        **actor_critic: Any,
    ) -> None:
        check_options(PPOModule.__init__, locals())
        if length_adaptive_alpha is not None and lam != LAM:
            raise ValueError(f"lam={lam} would not be read with length_adaptive_alpha={length_adaptive_alpha}")
        if truncation == "mask" and (penalty := actor_critic.get("missing_eos_penalty")):
            raise ValueError(f"missing_eos_penalty={penalty} would not be read with truncation='mask'")
        super().__init__(
            beta=beta,
            kl_estimator=kl_estimator,
            kl_placement=kl_placement,
            num_generations=num_generations,
            **actor_critic,
        )
        self.gamma, self.lam, self.critic_lam, self.gae_unit = gamma, lam, critic_lam, gae_unit
        self.length_adaptive_alpha, self.whiten_advantages = length_adaptive_alpha, whiten_advantages
        self.truncation, self.mask_truncated = truncation, truncation == "mask"
        self.reward_clip, self.positive_nll_coef = reward_clip, positive_nll_coef
        self.reward_scale = RunningScale() if normalize_rewards else None

    def credit(self, rollout: Rollout, penalty: Tensor | None) -> Rollout:
        """Adds the critic's values, what it is to learn, and the advantages of the tokens."""
        masks = (rollout.own, rollout.trained, rollout.truncated)
        own, trained, truncated = (mask.to(self.device, non_blocking=True) for mask in masks)
        bootstraps = self.truncation == "bootstrap"
        if bootstraps:
            self.require_stops("truncation='bootstrap'")
        values, last = self.value_rollout(rollout, last=bootstraps)
        written = rollout.rewards.to(self.device).masked_fill(~own.any(dim=1), torch.nan)  # nothing carries the others
        scores = self.scores(written)
        if rollout.turn_rewards is None:
            rewards = token_rewards(scores.nan_to_num(), own, penalty)
        else:  # what is not of a single turn comes with the last
            turns = rollout.turn_rewards.to(self.device)
            outcome, turns = self.held(written - turns.sum(dim=1)), self.held(turns)
            rewards = turns + token_rewards(outcome.nan_to_num(), own, penalty)
            scores = outcome + turns.sum(dim=1)
        end = torch.where(truncated, last, 0.0)
        time: dict[str, Any] = {"gamma": self.gamma, "bootstrap": end, "unit": self.gae_unit}
        lam = 1.0 if self.pretraining else self.critic_lam
        returns = generalized_advantages(rewards, values, own, lam=lam, **time)[1]
        advantages = generalized_advantages(rewards, values, own, lam=self.lam_of(own), **time)[0]
        statistics = rollout_statistics(rollout, scores, penalty, values, returns, trained, self.coefficients.kl)
        self._train_meters.update(statistics)
        if self.whiten_advantages:
            advantages = self.whitened(advantages, trained)
        advantages = advantages.masked_fill(~trained, 0.0)
        return replace(rollout, values=values, returns=returns, advantages=advantages)

    def scores(self, rewards: Tensor) -> Tensor:
        """What a completion's last token is rewarded with, [N] of rewards [N]; NaN where it was not judged."""
        if self.reward_scale is not None:
            exact = rewards.double()
            sums = torch.stack([(~exact.isnan()).sum(), exact.nansum(), exact.square().nansum()])
            count, total, squares = self.reduce(sums, "sum").tolist()
            self.reward_scale.update(count=count, total=total, squares=squares)
        return self.held(rewards)

    def held(self, rewards: Tensor) -> Tensor:
        """Rewards of any shape, divided by the deviation so far and held within the clip, as far as there are such."""
        if self.reward_scale is not None:
            rewards = rewards / self.reward_scale.deviation
        return rewards if self.reward_clip is None else rewards.clamp(-self.reward_clip, self.reward_clip)

    def lam_of(self, own: Tensor) -> float | Tensor:
        """Lambda of the advantages; [N] where it depends on the length. `own` is [N, T] bool."""
        if self.length_adaptive_alpha is None:
            return self.lam
        steps = own if self.gae_unit == "token" else turn_starts(own)
        return length_adaptive_lambda(steps.sum(dim=1), self.length_adaptive_alpha)

    def whitened(self, advantages: Tensor, trained: Tensor) -> Tensor:
        """Advantages [N, T] with mean 0 and sample deviation 1 over the tokens `trained` [N, T] of all ranks."""

        def of_all(tokens: Tensor) -> Tensor:
            return whiten(tokens[None], torch.ones_like(tokens, dtype=torch.bool)[None], ddof=1)[0]

        return torch.zeros_like(advantages).masked_scatter(trained, self.over_ranks(advantages[trained], of_all))

    def more_units(self, rollout: Rollout) -> dict[str, Tensor]:
        """The tokens of completions with a reward above 0, where their likelihood is learnt."""
        return {"positive_nll": _positive(rollout).sum(dim=1)} if self.positive_nll_coef else {}

    def more_terms(self, rollout: Rollout, scores: Scores) -> dict[str, Term]:
        """The negative log-likelihood of completions with a reward above 0 (VAPO, arXiv:2504.05118, eq. 12)."""
        if not self.positive_nll_coef:
            return {}
        mask = _positive(rollout).to(self.device, non_blocking=True)
        sums = aggregate_rows(-scores.token_logps, mask, reduction="token_mean")
        return {"positive_nll": Term.of_rows(*sums, self.positive_nll_coef)}

    def policy_objective(self, rollout: Rollout, scores: Scores) -> Objective:
        """Also logs the surrogate under the names of TRL's PPO."""
        found = super().policy_objective(rollout, scores)
        statistics = update_statistics(rollout, scores, found.statistics) if self.logging_due else {}
        return replace(found, statistics=found.statistics | statistics)

    def extra_state(self) -> dict[str, Any]:
        """Adds the deviation of the rewards so far."""
        return super().extra_state() | ({} if self.reward_scale is None else {"scale": self.reward_scale.state_dict()})

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes it up; a run that begins to scale in its middle begins to count there."""
        super().load_extra_state(state)
        if self.reward_scale is not None and "scale" in state:
            self.reward_scale.load_state_dict(state["scale"])

    def describe(self) -> dict[str, str]:
        """Adds how rewards become advantages and returns."""
        lam = f"lambda {self.lam:g}"
        if self.length_adaptive_alpha is not None:
            lam = f"lambda 1 - 1 / max({self.length_adaptive_alpha:g} * length, 1)"
        white = ", whitened (ddof 1) over the rollout's tokens on all ranks" if self.whiten_advantages else ""
        clip = "no clip" if self.reward_clip is None else f"held within {self.reward_clip:g}"
        scaled = "divided by their running deviation, " if self.reward_scale is not None else ""
        nll = f"; nll of rewarded completions, weight {self.positive_nll_coef:g}" if self.positive_nll_coef else ""
        held = super().describe()
        return held | {
            "loss": held["loss"] + nll,
            "scores": f"{scaled}{clip}, on the last own token",
            "advantages": f"GAE by {self.gae_unit}, gamma {self.gamma:g}, {lam}{white}",
            "returns": f"GAE with lambda {self.critic_lam:g}, before whitening",
            "truncation": self.truncation,
        }


def _positive(rollout: Rollout) -> Tensor:
    """[N, T] bool, on the host: trained tokens of completions with a reward above 0."""
    return rollout.trained & (rollout.rewards > 0).cpu()[:, None]
