"""From the rewards of a rollout to its advantages, over all ranks where other prompts' rewards matter."""

from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from alignment_modules.functional import (
    AdvantageEstimator,
    Surrogate,
    decoupled_rewards,
    optimal_token_advantages,
    over_turns,
    returns_to_go,
    turn_returns,
    turn_sums,
)
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.acting import ActingModule

TURN_BASELINES = ("group", "leave_one_out", "none")
"""Baselines that say what a single turn is compared with."""


def add_advantages(
    module: ActingModule,
    rollout: Rollout,
    estimator: AdvantageEstimator,
    penalty: Tensor | None,
    *,
    unit: Literal["completion", "turn"] = "completion",
) -> Rollout:
    """Adds the advantages, [N] or [N, T] float32; completions that are compared with nothing are left out of the loss.

    A penalty is taken from the reward of the whole completion where that is compared with the others', else from each
    token's, whose advantage then counts what is still to come.

    Args:
        module: Knows the other ranks, and the rewards' weights.
        rollout: Of the whole batch on this rank.
        estimator: How rewards become advantages.
        penalty: [N, T], of each token; None: nothing.
        unit: Whether whole completions are compared, or each turn by itself.
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
    if unit == "turn":
        advantages = _turn_advantages(module, rollout, estimator, rewards, penalty)
    elif estimator.baseline == "optimal_token" or (penalty is not None and estimator.to_go):
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


def returns_of_turns(rollout: Rollout, rewards: Tensor, penalty: Tensor | None = None) -> Tensor:
    """What is still to come at each turn: [prompts * turns, G] float64, NaN where a completion has no such turn.

    Args:
        rollout: Of the whole batch on this rank, with `turn_rewards`.
        rewards: [prompts, G]; NaN: not compared.
        penalty: [N, T], of each token; None: nothing.
    """
    given = cast(Tensor, rollout.turn_rewards)
    found = turn_returns(rewards.flatten(), given, rollout.own, None if penalty is None else penalty.cpu())
    return _side_by_side(found, rollout.group)


def _turn_advantages(
    module: ActingModule,
    rollout: Rollout,
    estimator: AdvantageEstimator,
    rewards: Tensor,
    penalty: Tensor | None,
) -> Tensor:
    """Advantages [prompts, G, T] on the host, equal for all tokens of a turn; 0 where a turn is compared with nothing.

    Args:
        module: Knows the other ranks.
        rollout: Of the whole batch on this rank, with `turn_rewards`.
        estimator: How returns become advantages: a turn's group are the completions of its prompt that have this turn.
        rewards: [prompts, G]; NaN: not compared.
        penalty: [N, T], taken from the return of the turns up to the token; None: nothing.
    """
    lengths = _side_by_side(turn_sums(torch.ones(rollout.own.shape), rollout.own), rollout.group)
    returns = returns_of_turns(rollout, rewards, penalty)
    found = completion_advantages(module, estimator, returns, lengths)
    turns = len(found) // max(len(rollout), 1)
    by_completion = found.view(len(rollout), turns, rollout.group).transpose(1, 2).reshape(len(rollout.own), turns)
    return over_turns(by_completion, rollout.own).view(*rewards.shape, rollout.own.shape[1])


def _side_by_side(values: Tensor, group: int) -> Tensor:
    """The same turn of a prompt's completions in one row: [N, turns] to [prompts * turns, G]."""
    grouped = values.view(-1, group, values.shape[1]) if values.numel() else values.new_zeros(0, group, 1)
    return grouped.transpose(1, 2).reshape(-1, group)


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


def check_turns(module: ActingModule, estimator: AdvantageEstimator, surrogate: Surrogate) -> None:
    """Refuses advantages of turns where nothing is said of turns, or turns could not be told apart.

    Args:
        module: With its environments.
        estimator: How returns become advantages.
        surrogate: The loss that reads the advantages.

    Raises:
        ValueError: If no environment has `turn_rewards`, or another option takes completions as a whole.
    """
    unit = "advantage_unit='turn'"
    if module.episodes is None or not module.episodes.environments.judges_turns:
        raise ValueError(f"{unit} needs environments with turn_rewards: no other reward is one of a turn")
    if estimator.decoupled:
        raise ValueError(f"{unit} does not go with multi_objective_aggregation='normalize_then_sum'")
    if estimator.baseline not in TURN_BASELINES:
        raise ValueError(
            f"{unit} does not go with baseline={estimator.baseline!r}: it takes one of "
            f"{', '.join(map(repr, TURN_BASELINES))}"
        )
    loss = surrogate.loss
    if loss == "gmpo":
        raise ValueError(f"{unit} does not go with loss='gmpo', a loss of whole completions")
    if surrogate.level == "sequence" and loss != "vespo":
        raise ValueError(
            f"{unit} does not go with importance_level='sequence' of loss={loss!r}, whose gradient mixes the turns: "
            "take 'token' or 'sequence_token', of a loss that has it"
        )
