"""Episodes as rows and numbers: of tests, of predictions, of samples for people, and as data for fine-tuning."""

import json

import pytest
import torch

from alignment_modules.callbacks.jsonl import to_json_line
from alignment_modules.callbacks.samples.tables import text_table
from alignment_modules.evaluation import EvaluationConfig, Evaluator
from alignment_modules.rewards import RewardSet
from alignment_modules.rollouts.actor import Actor
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.engines import InProcessEngine
from alignment_modules.rollouts.environments.making import make_episodes
from alignment_modules.rollouts.environments.rewards import EnvironmentReward
from alignment_modules.rollouts.parameters import SamplingOptions
from datamodules import SFTDataModule
from tests.rollouts.environments.acting import Scripted, Sum, batch_of, call
from tests.rollouts.environments.conftest import acting_folder, tokenizer  # noqa: F401


def speak(text):
    """Adds 2 and then 4 where it is asked to go far; calls what is not there where it is asked to fail."""
    asked = text.count("<|tool|>")
    if "fail" in text:
        return call("missing") if not asked else "sorry"
    return (call("add", number=2), call("add", number=4), "done")[min(asked, 2)]


@pytest.fixture
def batch():
    return batch_of(["go far", "fail"], goal=[5, 50], index=[7, 3], completion=["6", "none"])


@pytest.fixture
def evaluate(tokenizer):  # noqa: F811
    def make(**options):
        config = EvaluationConfig(environments=Sum, max_completion_length=200, **options)
        codec = Codec(tokenizer)
        return Evaluator(InProcessEngine(codec), config, codec=codec), Scripted(tokenizer, speak)

    return make


def test_a_test_counts_calls_and_gives_episodes_as_rows(evaluate, batch):
    evaluator, policy = evaluate(num_samples=2)
    measured = evaluator.test(policy, batch)
    value = {name: float(total) / float(weight) for name, (total, weight, _) in measured.statistics.items()}
    assert value["exact_match"] == 0.5
    wanted = {"tools/calls": 1.5, "tools/calls_solved": 2.0, "tools/failure_rate": 1 / 3, "episode/turns": 2.5}
    assert {name: value[name] for name in wanted} == pytest.approx(wanted)
    first, second = measured.rows
    roles = ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [message["role"] for message in first["messages"]] == roles
    assert "From" in first["messages"][0]["content"], "what the environment said is there"
    assert first["messages"][1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"number": 2}}
    assert first["tools"][0]["function"]["name"] == "add"
    assert (first["index"], first["turns"], first["tool_calls"], first["reward"]) == (7, 3, 2, 1.0)
    assert (second["stop_reason"], second["tool_failures"]) == ("answer", 1)
    assert second["reward"] == pytest.approx(second["environment_reward"])
    assert first["expected"] == "6"
    assert "completion" not in first, "it would be taken for a demonstration without calls"
    assert len(first["episodes"]) == len(first["rewards"]) == 2
    assert first["episodes"][0]["messages"][-1]["content"] == "done"
    json.dumps(measured.rows)


def test_predictions_are_data_for_fine_tuning(evaluate, batch, acting_folder, tmp_path):  # noqa: F811
    evaluator, policy = evaluate()

    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(map(to_json_line, evaluator.predict(policy, batch))))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["index"] for row in rows] == [7, 3]
    data = SFTDataModule(train=str(path), tokenizer=acting_folder, batch_size=2)
    data.setup("fit")
    (read,) = data.train_dataloader()
    [row] = [row for row, labels in enumerate(read["labels"]) if "done" in data.tokenizer.decode(labels[labels >= 0])]
    learnt = data.tokenizer.decode(read["input_ids"][row][read["labels"][row] != -100])
    assert learnt == call("add", number=2) + "</s>" + call("add", number=4) + "</s>" + "done</s>"
    seen = data.tokenizer.decode(read["input_ids"][row])
    assert seen.removeprefix("<s>").startswith("add <|user|>go far"), "with the tools, as the policy saw it"


def test_samples_for_people_tell_the_policys_tokens_from_the_tools(evaluate, batch):
    evaluator, policy = evaluate()
    columns = evaluator.samples(policy, batch, step=3)
    assert {len(values) for values in columns.values()} == {2}
    assert columns["id"] == ["3/7/0", "3/3/0"]
    assert columns["prompt"][0].startswith("add <|user|>go far\nFrom")
    assert columns["expected"] == ["6", "none"]
    for tokens, own, completion in zip(columns["tokens"], columns["own"], columns["completion"], strict=True):
        assert "".join(tokens).removesuffix("</s>") == completion
        others = "".join(token for token, ours in zip(tokens, own, strict=True) if not ours)
        assert "<|tool|>" in others
        assert "<tool_call>" not in others
    assert [message.get("failed") for message in columns["episode"][1]] == [None, "unknown_tool", None]
    rows = [{name: values[row] for name, values in columns.items()} for row in range(2)]
    assert '⇒ add {"number": 2}<br>⇐ now' in text_table(rows, 120)


def test_an_actor_tells_of_its_episodes(batch, tokenizer):  # noqa: F811
    codec = Codec(tokenizer)
    episodes = make_episodes(Sum, None, codec=codec)
    actor = Actor(
        InProcessEngine(codec), RewardSet([EnvironmentReward()]), SamplingOptions(200), 2, codec=codec,
        episodes=episodes,
    )  # fmt: skip
    rollout = actor.roll_out(Scripted(tokenizer, speak), batch | {"source_name": ["far", "near"]}, step=0)
    assert float(actor.statistics["tools/calls"].total) == 6
    told = actor.statistics["near/tools/failure_rate"]
    assert float(told.total / told.weight) == 1.0
    every, some = actor.rows(rollout), actor.rows(rollout, first=3)
    assert every["stop_reason"] == ["answer"] * 4
    assert every["turns"] == [3, 3, 2, 2]
    assert not {"episode", "messages"} & every.keys()
    assert [len(messages) for messages in some["episode"]] == [5, 5, 3]
    assert some["messages"][0][0]["content"].startswith("go far\nFrom")
    assert {len(values) for values in some.values()} == {3}
    assert torch.equal(rollout.own.sum(1), torch.tensor([sum(own) for own in actor.rows(rollout, first=4)["own"]]))
