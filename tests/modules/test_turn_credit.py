"""GRPO with advantages of turns: against loops, where they are those of completions, and what is refused."""

from dataclasses import replace

import pytest
import torch

from alignment_modules import GRPOModule
from alignment_modules.rollouts.rollout import Rollout
from tests.modules.test_episodes import STEPWISE, SUM, data, make
from tests.rollouts.environments.conftest import acting_folder, model, tokenizer  # noqa: F401

NAN = float("nan")


@pytest.fixture
def turned(model, tokenizer):  # noqa: F811
    def factory(**options):
        return make(GRPOModule, model, tokenizer, environments=STEPWISE, advantage_unit="turn", **options)

    return factory


def rollout_of(own, rewards, turn_rewards, group):
    own, rewards = torch.tensor(own).bool(), torch.tensor(rewards)
    zeros = torch.zeros(own.shape)
    return Rollout(
        prompt_ids=torch.ones(len(own) // group, 1, dtype=torch.long),
        prompt_mask=torch.ones(len(own) // group, 1, dtype=torch.bool),
        group=group,
        ids=zeros.long(),
        mask=torch.ones_like(own),
        own=own,
        trained=own,
        rewards=rewards,
        reward_values=rewards[:, None],
        turn_rewards=torch.tensor(turn_rewards),
        truncated=torch.zeros(len(own), dtype=torch.bool),
        sampled_logps=zeros,
    )


TWO_TURNS = rollout_of(
    [[1, 0, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]],
    [3.0, 5.0, 1.0, NAN],
    [[1.0, 0, 0, 2], [4.0, 0, 1, 0], [0, 1.0, 0, 0], [0, 0, 0, 0]],
    group=4,
)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("none", [[0, 0, 0.5, 0.5], [2, 0, -0.5, 0], [-2, -2, 0, 0], [0, 0, 0, 0]]),
        ("group", [[0, 0, 0.5**0.5, 0.5**0.5], [1, 0, -(0.5**0.5), 0], [-1, -1, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_each_turn_less_the_mean_of_the_same_turn_by_hand(turned, scale, expected):
    """Rewards 3, 5, 1, of which 2 and 1 are still to come at the second turn; the fourth is not judged."""
    found = turned(scale_rewards=scale).credit(TWO_TURNS, None)
    torch.testing.assert_close(found.advantages, torch.tensor(expected))
    assert found.trained.any(dim=1).tolist() == [True, True, True, False]


def test_what_the_kl_takes_counts_at_the_turns_up_to_it(turned):
    """The first episode pays 3 in its second turn: returns 0, 5, 1 and then -1, 1."""
    penalty = torch.zeros(4, 4)
    penalty[0, 2:] = torch.tensor([1.0, 2.0])
    found = turned(scale_rewards="none").credit(TWO_TURNS, penalty).advantages
    torch.testing.assert_close(found, torch.tensor([[-2.0, 0, -1, -1], [3, 0, 1, 0], [-1, -1, 0, 0], [0, 0, 0, 0]]))


def test_what_is_divided_by_the_batch_spans_ranks_of_other_numbers_of_turns(turned, monkeypatch):
    module, other = turned(scale_rewards="batch"), torch.tensor([[4.0, 0.0], [NAN, 1.0]], dtype=torch.float64)
    rows = torch.stack([torch.cat([other, torch.full((2, 2), NAN)], dim=1), torch.ones(2, 4)], dim=-1)
    monkeypatch.setattr(module, "all_gather_ragged", lambda own: [own, rows.to(own)])
    found = module.credit(TWO_TURNS, None).advantages
    deviation = torch.tensor([3.0, 5, 1, 2, 1, 4, 0, 1]).std()
    expected = torch.tensor([[0, 0, 0.5, 0.5], [2, 0, -0.5, 0], [-2, -2, 0, 0], [0, 0, 0, 0]]) / deviation
    torch.testing.assert_close(found, expected)


def test_a_turn_that_no_other_completion_has_gets_0(turned):
    alone = replace(
        TWO_TURNS, own=TWO_TURNS.own & torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]) > 0
    )
    advantages = turned(scale_rewards="none").credit(alone, None).advantages
    assert advantages[0].tolist() == [0, 0, 0, 0]
    assert advantages[1].tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_rewards": "none"},
        {"scale_rewards": "batch"},
        {"scale_rewards": "batch_tokens"},
        {"scale_rewards": "mean"},
        {"baseline": "leave_one_out"},
        {"baseline": "none", "scale_rewards": "batch_tokens"},
    ],
)
def test_with_one_turn_they_are_those_of_completions(turned, model, tokenizer, options):  # noqa: F811
    rollout = rollout_of(
        [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]],
        [0.3, 0.1, NAN, 0.7, 0.7, -2.9],
        [[0, 0, 0.2, 0], [0.1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.9], [0, 0, 0, 0], [0, 0.3, 0, 0]],
        group=3,
    )
    whole = make(GRPOModule, model, tokenizer, environments=STEPWISE, **options).credit(rollout, None)
    found = turned(**options).credit(rollout, None)
    assert torch.equal(found.advantages, whole.advantages[:, None] * rollout.own)
    assert torch.equal(found.trained, whole.trained)


def test_a_group_of_equal_rewards_in_different_turns_teaches(turned):
    module, equal = turned(dynamic_sampling=1), replace(TWO_TURNS, rewards=torch.tensor([3.0, 3.0, 3.0, NAN]))
    assert module.informative(equal).tolist() == [True]
    assert super(GRPOModule, module).informative(equal).tolist() == [False]
    assert module.informative(equal.empty()).tolist() == []
    assert module.credit(equal.empty(), None).advantages.shape == (0, 4)


def test_a_step_on_episodes_is_that_of_their_returns(turned, train):
    """Against loops over what the environments told, with a KL in the reward."""
    module = turned(scale_rewards="none", beta=0.1, kl_estimator="k1", kl_placement="reward", num_iterations=2)
    train(module, [data()])
    rollout, episodes = module.rollout, module.actor.seen.episodes
    assert len({episode.turns for episode in episodes}) > 1
    returns = [[sum(e.turn_rewards[k:]) + e.reward for k in range(e.turns)] for e in episodes]
    for row, episode in enumerate(episodes):
        group = returns[row // 4 * 4 : row // 4 * 4 + 4]
        wanted, turn, before = [], -1, False
        for own in rollout.own[row].tolist():
            turn, before = turn + (own and not before), own
            same = [each[turn] for each in group if len(each) > turn] if own else [0.0]
            wanted.append(returns[row][turn] - sum(same) / len(same) if own else 0.0)
        assert turn == episode.turns - 1
        # the policy is its reference at first: there is nothing to pay
        assert rollout.advantages[row].tolist() == pytest.approx(wanted, abs=1e-4)
    assert "by turn" in module.describe()["advantages"]


def test_what_a_batch_brings_has_no_turns(turned):
    batch = {"prompts": torch.ones(1, 2).long(), "prompt_attention_mask": torch.ones(1, 2).long()}
    more = {"responses": torch.ones(4, 3).long(), "response_mask": torch.ones(4, 3), "rewards": torch.ones(4)}
    with pytest.raises(ValueError, match=r"advantage_unit='turn' reads turn_rewards of environments"):
        turned().check_batch(batch | more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environments": SUM}, r"advantage_unit='turn' needs environments with turn_rewards"),
        ({"baseline": "pass_at_k"}, r"baseline='pass_at_k': it takes one of 'group', 'leave_one_out', 'none'"),
        ({"preset": "remax"}, r"baseline='greedy'"),
        ({"baseline": "optimal_token"}, r"baseline='optimal_token'"),
        ({"preset": "gspo"}, r"importance_level='sequence' of loss='grpo'"),
        ({"loss": "gmpo"}, r"loss='gmpo', a loss of whole completions"),
        ({"advantage_unit": "word"}, r"advantage_unit='word'"),
    ],
)
def test_options_are_refused_by_name(model, tokenizer, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        make(GRPOModule, model, tokenizer, **({"environments": STEPWISE, "advantage_unit": "turn"} | options))
