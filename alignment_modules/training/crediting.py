"""From the rewards of a rollout to its advantages, over all ranks where other prompts' rewards matter."""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from alignment_modules.functional import (
    AdvantageEstimator,
    decoupled_rewards,
    optimal_token_advantages,
    returns_to_go,
)
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.acting import ActingModule


def add_advantages(
    module: ActingModule, rollout: Rollout, estimator: AdvantageEstimator, penalty: Tensor | None
) -> Rollout:
    """Adds the advantages, [N] or [N, T] float32; completions that are compared with nothing are left out of the loss.

    A penalty is taken from the reward of the whole completion where that is compared with the others', else from each
    token's, whose advantage then counts what is still to come.

    Args:
        module: Knows the other ranks, and the rewards' weights.
        rollout: Of the whole batch on this rank.
        estimator: How rewards become advantages.
        penalty: [N, T], of each token; None: nothing.
    """
    group = rollout.group
    rewards, lengths = rollout.rewards.view(-1, group), rollout.own.sum(dim=1).view(-1, group)
    if estimator.decoupled:
        rewards = decoupled_rewards(single_rewards(module, rollout).double(), torch.tensor(module.rewards.weights))
    rewards = rewards.masked_fill(~lengths.any(dim=1, keepdim=True), torch.nan)  # of nothing that can be learnt
    judged = ~rewards.isnan()
    if rollout.greedy_rewards is not None:
        judged = judged & ~rollout.greedy_rewards.isnan()[:, None]
    if estimator.grouped:
        judged = judged & (judged.sum(dim=1, keepdim=True) >= 2)
    if estimator.baseline == "optimal_token" or (penalty is not None and estimator.to_go):
        advantages = _token_advantages(module, rollout, estimator, rewards, judged, penalty)
    else:
        costs = 0.0 if penalty is None else penalty.sum(dim=-1).cpu().view(-1, group)
        advantages = completion_advantages(module, estimator, rewards - costs, lengths, rollout.greedy_rewards)
    return replace(rollout, trained=rollout.trained & judged.view(-1, 1), advantages=advantages.float().flatten(0, 1))


def single_rewards(module: ActingModule, rollout: Rollout) -> Tensor:
    """Each reward by itself, [prompts, G, rewards], NaN where a completion has none at all or is not compared.

    Args:
        module: With its rewards.
        rollout: Of the whole batch on this rank.
    """
    values = cast(Tensor, rollout.reward_values).masked_fill(rollout.rewards.isnan()[:, None], torch.nan)
    return values.view(-1, rollout.group, len(module.rewards))


def completion_advantages(
    module: ActingModule,
    estimator: AdvantageEstimator,
    rewards: Tensor,
    lengths: Tensor,
    greedy_rewards: Tensor | None = None,
) -> Tensor:
    """Advantages [prompts, G] of rewards [prompts, G], 0 where NaN; scaling by the batch spans all ranks.

    Args:
        module: Knows the other ranks.
        estimator: How rewards become advantages.
        rewards: [prompts, G]; NaN: not judged.
        lengths: [prompts, G], how many tokens the policy wrote.
        greedy_rewards: [prompts], of greedy completions, where they are the baseline.
    """
    if not estimator.spans_batch:
        return estimator(rewards, lengths=lengths, greedy_rewards=greedy_rewards)
    told = [rewards.double(), lengths.double()]
    if greedy_rewards is not None:
        told.append(greedy_rewards.double()[:, None].expand(rewards.shape))

    def of_all(every: Tensor) -> Tensor:
        found, counts, *greedy = every.unbind(dim=-1)
        return estimator(found.to(rewards), lengths=counts, greedy_rewards=greedy[0][:, 0] if greedy else None)

    return module.over_ranks(torch.stack(told, dim=-1), of_all)


def _token_advantages(
    module: ActingModule,
    rollout: Rollout,
    estimator: AdvantageEstimator,
    rewards: Tensor,
    judged: Tensor,
    penalty: Tensor | None,
) -> Tensor:
    """Advantages [prompts, G, T] of single tokens, on the host."""
    mask, shape = rollout.own & judged.view(-1, 1), (*rewards.shape, rollout.ids.shape[1])
    if rollout.greedy_rewards is not None:
        rewards = rewards - rollout.greedy_rewards[:, None]
    values = returns_to_go(rewards.flatten(), mask, None if penalty is None else penalty.cpu()).view(shape)
    if rollout.gradient_norms is not None:
        values = optimal_token_advantages(values, rollout.gradient_norms.cpu().view(shape), mask.view(shape))
    if estimator.spans_batch:
        values = module.whiten_over_ranks(values.flatten(0, 1), mask).view(shape)
    return values


def check_decoupled(module: ActingModule, estimator: AdvantageEstimator, in_reward: float) -> None:
    """Refuses what would be taken from the sum of rewards, which is not read where each is normalised.

    Args:
        module: With its rewards.
        estimator: How rewards become advantages.
        in_reward: Strength of a KL penalty in the reward.

    Raises:
        ValueError: If there is one reward alone, or a penalty.
    """
    if not estimator.decoupled:
        return
    if len(module.rewards) < 2:
        raise ValueError(
            "multi_objective_aggregation='normalize_then_sum' needs two or more rewards, got "
            f"{', '.join(module.rewards.names)}"
        )
    for name, value in {"beta": in_reward, "missing_eos_penalty": module.actor.missing_eos_penalty}.items():
        if value:
            raise ValueError(
                f"{name}={value} is taken from the sum of the rewards, which multi_objective_aggregation="
                "'normalize_then_sum' does not read: set it to 0" + ", or kl_placement='loss'" * (name == "beta")
            )
