"""Paradigms whose policy acts on environments: rewards, credit, validation and test, options and checkpoints."""

import copy
import pickle

import lightning as L
import pytest
import torch

from alignment_modules import GRPOModule, OnlineDPOModule, PolicyConfig, PPOModule, SFTModule
from alignment_modules.evaluation import EvaluationConfig
from alignment_modules.rollouts.engines import Engine
from alignment_modules.rollouts.environments import ToolOptions
from tests.rollouts.environments.acting import batch_of
from tests.rollouts.environments.conftest import acting_folder, model, tokenizer  # noqa: F401

LETTERS = "tests.rollouts.environments.acting.LettersFormat"
SUM = "tests.rollouts.environments.acting.Sum"
STEPWISE = "tests.rollouts.environments.acting.Stepwise"
BROKEN = "tests.rollouts.environments.acting.Broken"


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


def brief(completions, episodes, goal):
    """A reward that reads all: of each completion its episode, its answer and its column."""
    assert [episode.answer for episode in episodes] == completions
    assert len(goal) == len(episodes)
    return [-float(len(episode.calls)) for episode in episodes]


def test_functions_read_episodes_and_add_to_the_environments_reward(model, tokenizer, train):  # noqa: F811
    for weights, factors in ((None, (1.0, 1.0)), ([0.5], (0.5, 1.0)), ([0.5, 3.0], (0.5, 3.0))):
        module = make(GRPOModule, model, tokenizer, rewards=brief, reward_weights=weights)
        assert module.rewards.names == ("brief", "environment")
        assert module.rewards.weights == factors
    train(module, [data()])
    episodes = module.actor.seen.episodes
    wanted = [-0.5 * len(episode.calls) + 3.0 * episode.reward for episode in episodes]
    assert module.rollout.rewards.tolist() == pytest.approx(wanted)


def test_an_episode_whose_environment_failed_is_left_out(model, tokenizer, train):  # noqa: F811
    batch = data() | {"how": ["", "reward"]}
    module = make(GRPOModule, model, tokenizer, environments=BROKEN, rewards=brief)
    with pytest.warns(UserWarning, match="4 of 8 episodes are not judged"):
        trainer = train(module, [batch])
    rollout = module.rollout
    assert rollout.rewards.isnan().tolist() == [False] * 4 + [True] * 4
    assert not rollout.trained[4:].any()
    assert rollout.own[4:].any()
    assert trainer.callback_metrics["train/environment/errors"] == 0.5
    assert trainer.callback_metrics["train/frac_not_judged"] == 0.5


@pytest.mark.parametrize("cls", [OnlineDPOModule, GRPOModule, PPOModule])
def test_the_first_updates_ratio_is_exactly_one(model, tokenizer, train, cls):  # noqa: F811
    module = make(cls, model, tokenizer, num_generations=2)
    module.kept_ratios = []
    trainer = train(module, [data()])
    assert trainer.global_step == 1
    assert (module.rollout.mask & ~module.rollout.own).any()
    if cls is not OnlineDPOModule:
        assert torch.cat(module.kept_ratios).eq(1.0).all()
    weights = dict(model.named_parameters())
    assert any(not torch.equal(weights[name], p) for name, p in module.policy.named_parameters())


def test_old_log_probabilities_and_reference_score_the_same_tokens(model, tokenizer, train):  # noqa: F811
    """A second update compares with the policy that sampled, at its own tokens alone."""
    module = make(GRPOModule, model, tokenizer, beta=0.1, num_iterations=2, environments=STEPWISE)
    train(module, [data()])
    rollout = module.rollout
    assert rollout.own.any(dim=1).all()
    for values in (rollout.reference_logps, rollout.sampled_logps):
        assert values[~rollout.own].eq(0).all()
        assert values[rollout.own].lt(0).all()
    torch.testing.assert_close(rollout.reference_logps, rollout.sampled_logps, atol=1e-5, rtol=0)


def test_given_completions_go_past_the_loop(model, tokenizer, train):  # noqa: F811
    module = make(GRPOModule, model, tokenizer, rewards=lambda completions: [float(len(text)) for text in completions])
    train(module, [data()])
    first = module.rollout
    given = {
        "prompts": first.prompt_ids,
        "prompt_attention_mask": first.prompt_mask.long(),
        "responses": first.ids,
        "response_mask": first.mask,
        "response_loss_mask": first.own,
        "rewards": first.rewards,
    }
    again = make(GRPOModule, model, tokenizer)
    train(again, [given])
    assert torch.equal(again.rollout.ids, first.ids)
    assert torch.equal(again.rollout.own, first.own)
    for name, parameter in module.policy.named_parameters():
        torch.testing.assert_close(dict(again.policy.named_parameters())[name], parameter, atol=1e-6, rtol=0)


def measured(module, batch, kind):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    return (
        getattr(trainer, kind)(module, loader, verbose=False)[0]
        if kind != "predict"
        else trainer.predict(module, loader)
    )


def test_every_policy_is_tested_by_the_same_loop(model, tokenizer):  # noqa: F811
    config = EvaluationConfig(
        environments=SUM,
        tool_options=ToolOptions(format=LETTERS),
        max_turns=4,
        max_completion_length=100,
        num_samples=3,
    )
    module = SFTModule(policy=model, tokenizer=tokenizer, evaluation=config)
    for kind in ("test", "validate"):
        found = measured(module, data(), kind)
        prefix = kind.replace("validate", "val")
        assert found[f"{prefix}/reward"] > 0
        assert 0 <= found[f"{prefix}/sample_accuracy"] <= 1
        assert found[f"{prefix}/episode/turns"] >= 1
        assert found[f"{prefix}/episode/stop/answer"] > 0
    [rows] = measured(module, data(), "predict")
    assert len(rows) == 2
    assert all(len(row["episodes"]) == len(row["rewards"]) == 3 for row in rows)


def test_what_is_asked_for_by_name_verifies_instead(model, tokenizer):  # noqa: F811
    given = {"environments": SUM, "tool_options": ToolOptions(format=LETTERS), "max_completion_length": 60}
    config = EvaluationConfig(verifier="ExactMatch", **given)
    module = SFTModule(policy=model, tokenizer=tokenizer, evaluation=config)
    found = measured(module, data() | {"answer": ["never", "never"]}, "test")
    assert found["test/exact_match"] == 0


def test_a_module_that_acts_is_validated_on_what_it_acts_on(model, tokenizer, train):  # noqa: F811
    """Environments begin the same at every validation, whatever the step."""
    module = make(GRPOModule, model, tokenizer, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    seen = []
    judge = module.actor.judge
    module.actor.judge = lambda batch, completions: seen.append(completions.episodes) or judge(batch, completions)
    loader = torch.utils.data.DataLoader([data()] * 2, batch_size=None)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=2, enable_progress_bar=False
    )
    trainer.fit(module, loader, loader)
    assert len(seen) == 8 - 2  # the sanity check has two, each epoch two
    assert len({str([e.prompt + e.messages for e in episodes]) for episodes in seen}) == 1
    metrics = trainer.callback_metrics
    assert metrics["val/reward"] == pytest.approx(sum(e.reward for e in seen[0]) / 2)
    assert metrics["val/episode/turns"] >= 1
    assert "val/exact_match" in metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environments": None, "tool_options": None}, r"max_turns=4 has no effect without environments or tools"),
        ({"environments": None, "max_turns": 8}, r"tool_options=.* has no effect without environments or tools"),
        (
            {"environments": None, "max_turns": 8, "tool_options": None, "max_tool_calls": 2},
            r"max_tool_calls=2 has no effect without environments or tools",
        ),
        ({"environments": None, "max_turns": 8, "tool_options": None}, r"rewards=None must be reward functions"),
        ({"environments": None, "tools": ["tests.rollouts.environments.things.double"]}, r"rewards=None must be"),
        ({"environments": "no.such.thing"}, r"environments='no.such.thing'"),
        ({"environments": 3}, r"environments=3 must be a factory"),
        ({"max_turns": 0}, r"max_turns=0 must be an integer from 1"),
        ({"max_tool_calls": 0}, r"max_tool_calls=0 must be an integer from 1"),
        ({"evaluation": EvaluationConfig(max_turns=3)}, r"evaluation.max_turns=3 has no effect without"),
        ({"evaluation": EvaluationConfig(environments="no.such")}, r"evaluation.environments='no.such'"),
    ],
)
def test_options_are_refused_by_name(model, tokenizer, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        make(GRPOModule, model, tokenizer, **options)


def test_an_engine_without_sessions_is_refused_by_name(model, tokenizer):  # noqa: F811
    class Single(Engine):
        def push(self, policy):
            pass

        def version(self):
            return 0

        def generate(self, *arguments, **keywords):
            raise AssertionError

    with pytest.raises(ValueError, match=r"engine=Single has no sessions, which environments and tools need"):
        make(GRPOModule, model, tokenizer, engine=Single())


def test_a_checkpoint_makes_the_module_again(acting_folder, tokenizer, train, tmp_path):  # noqa: F811
    config = PolicyConfig(path=acting_folder)
    module = GRPOModule(
        policy=config,
        tokenizer=acting_folder,
        environments={"sum": SUM, "steps": {"class_path": STEPWISE}},
        tools=["tests.rollouts.environments.things.double"],
        tool_options=ToolOptions(format=LETTERS, time_limit=3.0),
        max_completion_length=60,
        num_generations=2,
    )
    batch = data() | {"environment": ["sum", "steps"]}
    trainer = train(module, [batch])
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = GRPOModule.load_from_checkpoint(tmp_path / "one.ckpt")
    assert again.episodes.environments.names == ("sum", "steps")
    assert again.episodes.options == ToolOptions(format=LETTERS, time_limit=3.0)
    assert again.evaluator.episodes is again.episodes
    train(pickle.loads(pickle.dumps(again)), [batch])
