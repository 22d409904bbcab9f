"""Prompts of several sources: each judged by its own rewards, to its own length, and told of by itself."""

from dataclasses import replace

import pytest
import torch

from alignment_modules import EvaluationConfig
from alignment_modules.paradigms import GRPOModule, OnlineDPOModule, PPOModule
from alignment_modules.rewards import RewardError
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.engines import InProcessEngine
from alignment_modules.rollouts.parameters import SamplingOptions
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.own_rows import OwnRows
from tests.batches import Digits, prompts, threes

NAMES = ["math", "code", "math", "code"]


class Length:
    """A reward that says whom it was asked about."""

    name = "length"

    def __init__(self):
        self.sources = []

    def __call__(self, completions, source_name):
        self.sources += source_name
        return [float(len(text.split())) for text in completions]


def sourced(count=4, **more):
    batch = prompts(count) | {"source_name": NAMES[:count]}
    return batch | {"reward_names": [("length",) if n == "math" else ("threes",) for n in NAMES[:count]]} | more


@pytest.fixture
def make(tiny_llama):
    def build(module=GRPOModule, **options):
        given = {"rewards": [Length(), threes], "num_generations": 3, "max_completion_length": 6, "seed": 1}
        given |= {"tokenizer": Digits(), "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0)}
        return module(policy=tiny_llama, **(given | options))

    return build


@pytest.mark.parametrize("module", [GRPOModule, PPOModule, OnlineDPOModule])
def test_each_source_is_judged_by_its_own_rewards(make, train, module):
    module = make(module)
    metrics = train(module, [sourced()]).callback_metrics
    rollout, length = module.rollout, module.rewards.functions[0]
    assert length.sources == ["math"] * 6
    written = torch.tensor([[True, False]] * 3 + [[False, True]] * 3).repeat(2, 1)
    assert torch.equal(~rollout.reward_values.isnan(), written)
    assert torch.equal(rollout.rewards, rollout.reward_values.nansum(dim=1))
    lengths = rollout.mask.sum(dim=1).float().view(4, 3)
    assert float(metrics["train/rewards/length/mean"]) == pytest.approx(float(rollout.reward_values[:, 0].nanmean()))
    assert float(metrics["train/rewards/length/not_applicable"]) == 0.0  # it was asked about no others
    for source, rows in (("math", [0, 2]), ("code", [1, 3])):
        found = {key.split(f"{source}/")[1]: float(value) for key, value in metrics.items() if f"/{source}/" in key}
        rewards = rollout.rewards.view(4, 3)[rows]
        assert found["reward"] == pytest.approx(float(rewards.mean()))
        assert found["completions/mean_length"] == pytest.approx(float(lengths[rows].mean()))
        assert found["groups_with_signal"] == float((rewards.amax(1) > rewards.amin(1)).float().mean())
        assert ("rewards/length/mean" in found) == (source == "math")
        assert ("rewards/threes/mean" in found) == (source == "code")
    assert module.last_rollout["source"] == [name for name in NAMES for _ in range(3)]


def test_a_source_that_names_no_rewards_is_judged_by_all(make, train):
    module = make()
    train(module, [sourced(reward_names=[None, ("threes",), None, ("threes",)])])
    assert module.rewards.functions[0].sources == ["math"] * 6
    assert int(module.rollout.reward_values.isnan().sum()) == 6


def test_rewards_by_themselves_are_normalised_among_those_that_judge(make, train):
    """A reward that judges none of a group says nothing of it, and the other alone makes its advantages."""
    both = make(multi_objective_aggregation="normalize_then_sum", scale_rewards="none")
    train(both, [sourced()])
    values, advantages = both.rollout.reward_values, both.rollout.advantages.view(4, 3)
    for row, column in enumerate((0, 1, 0, 1)):
        own = values[3 * row : 3 * row + 3, column]
        spread = own.std() if own.std() > 0 else torch.tensor(1.0)
        assert advantages[row].tolist() == pytest.approx(((own - own.mean()) / spread).tolist(), abs=1e-5)


@pytest.mark.parametrize("greedy", [False, True])
def test_completions_end_at_the_limit_of_their_row(make, greedy):
    module, batch, limits = make(), prompts(4), [2, None, 1, 4]
    free, held = (
        module.actor.complete(module.policy, own, 0, greedy=greedy)
        for own in (batch, batch | {"completion_limits": limits})
    )
    each = torch.tensor([limit or 6 for limit in limits]).repeat_interleave(1 if greedy else 3)
    lengths = torch.minimum(free.mask.sum(dim=1), each)
    assert torch.equal(held.mask.sum(dim=1), lengths)
    assert torch.equal(held.ids, free.ids[:, : held.ids.shape[1]] * held.mask)
    assert torch.equal(held.truncated, free.truncated | (free.mask.sum(dim=1) > each))


def test_a_limit_counts_as_the_modules_own_does(make, train):
    module = make(mask_truncated=True, missing_eos_penalty=0.5, rewards=threes)
    batch = {key: value for key, value in sourced().items() if key != "reward_names"}
    metrics = train(module, [batch | {"completion_limits": [1, 6, 1, 6]}]).callback_metrics
    cut = module.rollout.truncated
    assert cut.view(4, 3)[[0, 2]].all()
    assert not module.rollout.trained[cut].any()
    assert float(metrics["train/math/completions/mean_length"]) == 1.0
    assert float(metrics["train/completions/clipped_ratio"]) == pytest.approx(float(cut.float().mean()))


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"completion_limits": [2, 2, 2, 7]}, ValueError, "row 3 .*'code'.*=7; it must be .* 1 to max_completion_.*=6"),
        (
            {"completion_limits": [2, 0, 2, 2]},
            ValueError,
            r"row 1 of a batch \(source 'code'\) has completion_limits=0",
        ),
        (
            {"reward_names": [None, ("brevity",), None, None]},
            ValueError,
            "row 1 .*'code'.* by 'brevity'.*length, threes",
        ),
        ({"reward_names": [None, (), None, None]}, ValueError, r"row 1 .*'code'.*reward_names=.*at least one name"),
        ({"source_weights": torch.tensor([1.0, -1.0, 1.0, 1.0])}, ValueError, "is -1 in row 1 of a batch .*'code'"),
        ({"source_weights": torch.tensor([1.0, torch.nan, 1.0, 1.0])}, ValueError, "is nan in row 1"),
        ({"source_weights": torch.ones(3)}, ValueError, r"one number a row, got \(3,\)"),
        ({"source_weights": [1.0] * 4}, ValueError, "one number a row, got list"),
        ({"source_name": ["math", "", "math", "code"]}, ValueError, "row 1 of a batch has source_name=''"),
        ({"source_name": ["math", "a/b", "math", "code"]}, ValueError, "row 1 of a batch has source_name='a/b'"),
        ({"source_name": ["math", None, "math", "code"]}, ValueError, "row 1 of a batch has source_name=None"),
    ],
)
def test_refuses_before_anything_is_sampled(make, train, change, error, named):
    module = make()
    module.engine.generate = None
    with pytest.raises(error, match=named):
        train(module, [sourced() | change])


def test_a_source_called_like_another_metric_is_refused(make, train):
    module = make(PPOModule, rewards=threes)
    batch = sourced(source_name=["critic", "math", "critic", "math"])
    del batch["reward_names"]
    with pytest.raises(ValueError, match=r"a source of the data is called 'critic'.*'critic/loss'"):
        train(module, [batch])


def test_a_reward_that_fails_is_told_of_by_what_it_judges(make, train):
    def fails(completions, answer):
        raise KeyError("no answer")

    with pytest.raises(RewardError, match=r"'fails' raised in row 0"):
        train(make(rewards=[fails, threes]), [sourced(reward_names=[("threes",)] * 3 + [("fails",)], answer=["4"] * 4)])


def test_a_rollout_keeps_its_sources_through_cuts_and_checkpoints(make):
    module = make()
    batch = sourced(source_weights=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    rollout = module.actor.roll_out(module.policy, batch, step=0)
    assert rollout.select(torch.tensor([True, False, False, True])).source_name == ["math", "code"]
    assert rollout.select(torch.tensor([3, 0])).source_weights.tolist() == [4.0, 1.0]
    assert rollout.empty().source_name == []
    joined = Rollout.join([rollout.select(slice(0, 1)), Rollout(**rollout.select(slice(1, 2)).state_dict())])
    assert joined.source_name == ["math", "code"]
    assert [piece.source_name for piece in rollout.micro_batches(6)] == [["math", "code"]] * 2
    with pytest.raises(ValueError, match="source_name is not of one kind"):
        Rollout.join([rollout, replace(rollout, source_name=None)])


def test_groups_that_wait_are_told_of_by_source(make, train):
    module = make(dynamic_sampling=3)
    metrics = train(module, [sourced(), sourced()]).callback_metrics
    assert {"train/math/loss", "train/math/reward", "train/code/reward"} <= metrics.keys()


def test_validation_measures_each_source(make):
    import lightning as L

    class Threes:
        name = "exact_match"

        def __call__(self, completions, answer):
            return [float("3" in text.split()) for text in completions]

    module = make(evaluation=EvaluationConfig(verifier=Threes(), num_samples=2, max_completion_length=6))
    columns = {"answer": ["x"] * 4}
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, barebones=False
    )
    for stage, run in (("val", trainer.validate), ("test", trainer.test)):
        [metrics] = run(module, torch.utils.data.DataLoader([sourced(**columns)], batch_size=None), verbose=False)
        for name in ("exact_match", "reward"):
            halves = [metrics[f"{stage}/{source}/{name}"] for source in ("math", "code")]
            assert metrics[f"{stage}/{name}"] == pytest.approx(sum(halves) / 2), name
    assert {"test/math/pass@2", "test/math/completions/mean_length"} <= metrics.keys()


def test_evaluation_ends_at_the_smaller_of_both_limits(make):
    module = make(evaluation=EvaluationConfig(max_completion_length=3))
    lengths = module.generate(prompts(4) | {"completion_limits": [1, 2, 5, 6]}).mask.sum(dim=1)
    free = module.generate(prompts(4)).mask.sum(dim=1)
    assert lengths.tolist() == torch.minimum(free, torch.tensor([1, 2, 3, 3])).tolist()
    with pytest.raises(
        ValueError, match="row 1 of a batch has completion_limits=0; it must be a whole number at least 1, or None"
    ):
        module.generate(prompts(2) | {"completion_limits": [1, 0]})


def test_rows_that_a_student_writes_end_at_their_limit(tiny_llama):
    sampling, limits = SamplingOptions(6), [1, None, 3, 6]
    own, engine = OwnRows(1.0, sampling, 3), InProcessEngine(Codec(Digits()))
    free, held = (
        own.write(tiny_llama, engine, Codec(Digits()), batch, 0)[0]
        for batch in (prompts(), prompts() | {"completion_limits": limits})
    )
    lengths = [(batch["labels"] != -100).sum(dim=1).tolist() for batch in (free, held)]
    assert lengths[1] == [min(length, limit or 6) for length, limit in zip(lengths[0], limits, strict=True)]
    width = held["input_ids"].shape[1]
    assert torch.equal(held["input_ids"], free["input_ids"][:, :width] * held["attention_mask"])
    with pytest.raises(ValueError, match=r"row 1 of a batch has completion_limits=7.*max_completion_length=6"):
        own.check(prompts(2) | {"completion_limits": [None, 7]}, "DistillationModule")
