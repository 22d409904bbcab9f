"""Paradigms whose policy acts on environments: rewards, credit, validation and test, options and checkpoints."""

import copy

import pytest
import torch

from alignment_modules import GRPOModule, PPOModule
from alignment_modules.rollouts.environments import ToolOptions
from tests.rollouts.environments.acting import batch_of
from tests.rollouts.environments.conftest import acting_folder, model, tokenizer  # noqa: F401

LETTERS = "tests.rollouts.environments.acting.LettersFormat"
SUM = "tests.rollouts.environments.acting.Sum"


def make(cls, model, tokenizer, **options):  # noqa: F811
    settings = {
        "environments": SUM,
        "tool_options": ToolOptions(format=LETTERS),
        "max_turns": 4,
        "max_completion_length": 100,
        "num_generations": 4,
        "micro_batch_size": 4,
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1),
    }
    return cls(policy=copy.deepcopy(model), tokenizer=tokenizer, **(settings | options))


def data():
    return batch_of(["Add up.", "Again?"], goal=[6, 20], index=[4, 9])


def test_grpo_learns_from_what_an_environment_says(model, tokenizer, train):  # noqa: F811
    module = make(GRPOModule, model, tokenizer)
    trainer = train(module, [data()])
    rollout, metrics, episodes = module.rollout, trainer.callback_metrics, module.actor.seen.episodes
    assert trainer.global_step == 1
    assert len({episode.turns for episode in episodes}) > 1
    assert rollout.rewards.tolist() == pytest.approx([episode.reward for episode in episodes])
    assert module.rewards.names == ("environment",)
    assert metrics["train/rewards/environment/mean"] == pytest.approx(sum(e.reward for e in episodes) / 8)
    tools = (rollout.mask & ~rollout.own).sum(dim=1)
    assert tools.tolist() == [episode.tool_tokens for episode in episodes]
    assert tools.any()
    assert torch.equal(rollout.trained, rollout.own)
    assert rollout.truncated.tolist() == [episode.stop_reason != "answer" for episode in episodes]
    assert metrics["train/sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["train/sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["train/grad_norm"] > 0
    assert "add" in tokenizer.decode(rollout.prompt_ids[0])
    assert [message["role"] for message in module.actor.seen.batch["prompt"][0]] == ["user"]


STEPWISE = "tests.rollouts.environments.acting.Stepwise"


def ends_of_turns(rollout, row):
    own = [*rollout.own[row].tolist(), False]
    return [place for place in range(len(own) - 1) if own[place] and not own[place + 1]]


@pytest.mark.parametrize("unit", ["token", "turn"])
def test_ppo_takes_rewards_of_turns_where_they_fall(model, tokenizer, train, unit):  # noqa: F811
    """Monte-Carlo returns are the sum of what is still to come: of the turns' rewards, and of the environment's."""
    more = {"gae_unit": unit, "beta": 0.0, "num_generations": 4, "reward_weights": [2.0], "environments": STEPWISE}
    module = make(PPOModule, model, tokenizer, **more)
    train(module, [data()])
    rollout, episodes = module.rollout, module.actor.seen.episodes
    assert max(episode.turns for episode in episodes) > 2
    assert rollout.rewards.tolist() == pytest.approx([2 * (e.reward + sum(e.turn_rewards)) for e in episodes])
    for row, episode in enumerate(episodes):
        ends = ends_of_turns(rollout, row)
        assert len(ends) == episode.turns == len(episode.turn_rewards)
        assert rollout.turn_rewards[row].nonzero().flatten().tolist() == [
            end for end, given in zip(ends, episode.turn_rewards, strict=True) if given
        ]
        for number, end in enumerate(ends):
            to_come = 2 * (sum(episode.turn_rewards[number:]) + episode.reward)
            assert float(rollout.returns[row, end]) == pytest.approx(to_come, abs=1e-4)
