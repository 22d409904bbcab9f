"""Runs of several steps in shards on two processes (gloo), against the same on one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.rewards.test_model import write_model

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.slow]
EXACT = ("clipped", "clipped by itself", "tied and checkpointed", "checkpointed without dropout", "cached", "synced")
EXACT += ("checkpointed selectively", "synced lora", "plain")
ROUNDED = ("sft bf16-mixed", "kto bf16-mixed", "ppo bf16-mixed", "ppo of bf16")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    write_model(root / "judge")
    for devices, strategy in ((1, "auto"), (2, "fsdp2")):
        (root / strategy).mkdir()
        command = [sys.executable, "-m", "tests.contract.sharded_runs", str(root / strategy), str(devices), strategy]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)  # a hang is a failure
        assert done.returncode == 0, done.stderr[-4000:]

    def read(name, strategies=("auto", "fsdp2")):
        return [torch.load(root / strategy / f"{name}.pt", weights_only=True) for strategy in strategies]

    return read


@pytest.mark.parametrize("name", EXACT)
def test_same_steps_as_one_process(runs, name):
    one, two = runs(name)
    assert max(float(value.abs().max()) for value in one["change"].values()) > 1e-3
    for key, value in one["change"].items():
        torch.testing.assert_close(two["change"][key], value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    for key in ("train/loss", "train/grad_norm"):
        assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-4)


@pytest.mark.parametrize("name", ROUNDED)
def test_mixed_precision_learns_the_same(runs, name):
    one, two = runs(name)
    assert two["metrics"]["train/loss"] == pytest.approx(one["metrics"]["train/loss"], rel=0.05, abs=0.01)
    before, after = (torch.cat([v.flatten().float() for v in found["change"].values()]) for found in (one, two))
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) > 0.9


def test_each_process_holds_its_share(runs):
    whole, shards = runs("held")
    assert whole == {"moved": True, "reference": True, "parameters": 1.0, "state": 1.0, "sharded": False}
    assert shards == {"moved": True, "reference": True, "parameters": 0.5, "state": 0.5, "sharded": True}
    assert runs("judge")[1]["share"] == pytest.approx(0.5, abs=0.02)


def test_processes_write_and_judge_each_for_itself(runs):
    for name in ("sampled", "judged"):
        one, two = runs(name)
        assert two["metrics"]["train/reward"] == pytest.approx(one["metrics"]["train/reward"], abs=1e-5)
        assert two["metrics"].get("val/reward") == pytest.approx(one["metrics"].get("val/reward"), abs=1e-5)
        assert two["metrics"]["train/completions/mean_length"] == one["metrics"]["train/completions/mean_length"]
    assert runs("predicted")[1]["ids"] == [0, 1, 2, 3]  # the first process's


def test_a_gradient_that_is_not_finite_on_one_process_stops_all(runs):
    for found in runs("guarded"):
        assert "gradient of optimizer step 1 is not finite" in found["said"]
        assert "'policy.model.embed_tokens.weight' (of " in found["said"]


def test_tensor_parallelism_is_refused(runs):
    (found,) = runs("refused", ["fsdp2"])
    assert "splits each weight over tensor_parallel_size=2 processes" in found["said"]
