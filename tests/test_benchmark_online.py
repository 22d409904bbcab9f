"""The benchmark of the online methods at a tiny size: its commands run; what they reach is no test's business."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.test_benchmark_offline import tiny_policy

ROOT = Path(__file__).resolve().parents[1]
FEW = ("--trainer.max_steps", "6", "--data.batch_size", "4", "--trainer.limit_test_batches", "1")


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """The benchmark, and the folder of a chain that has run, as far as its results can tell."""
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
    import online as benchmark

    root = tmp_path_factory.mktemp("online")
    for stage in ("sft", "grpo", "frozen"):
        tiny_policy(root / "seed0" / stage / "export")
    names = ("untrained", "pretrain", "sft", "dpo", "grpo", "frozen", "shuffled")
    chain = {name: asdict(benchmark.Measured(name, 0.5, 0.75, 1.0)) for name in names}
    (root / "seed0" / "results.json").write_text(json.dumps(chain))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", sys.argv[:1])
        yield benchmark, root


@pytest.mark.parametrize("name", ["GSPO", "online DPO", "on-policy distillation from GRPO", "PPO"])
def test_a_method_is_trained_and_measured(online, name):
    benchmark, root = online
    found = benchmark.Online(root / "seed0", 0, FEW).measure(name)
    assert found.stage == name
    assert 0 <= found.exact_match <= found.pass_at_k <= 1
    assert found.seconds > 0


def test_what_an_earlier_run_found_is_read(online, monkeypatch):
    benchmark, root = online
    measured = []

    def measure(self, name):
        measured.append(name)
        return benchmark.Measured(name, 0.9, 0.9, 2.0)

    monkeypatch.setattr(benchmark.Online, "measure", measure)
    first = benchmark.run_seed(root, 0, ["GRPO", "PPO"])
    assert benchmark.run_seed(root, 0, ["GRPO", "PPO"]) == first
    assert measured == ["GRPO", "PPO"]
    assert list(first) == ["SFT", "GRPO", "PPO", *benchmark.CONTROLS]
    bars = benchmark.bars({0: first}, root)
    assert all(held == [True] for held in bars.values())
    assert list(bars)[:2] == ["GRPO at least 15% over SFT", "PPO at least 15% over SFT"]
    low = first | {"PPO": benchmark.Measured("PPO", 0.6, 0.6, 2.0)}
    assert benchmark.bars({0: low}, root)["PPO at least 15% over SFT"] == [False]


def test_a_curriculum_is_trained_and_measured(online):
    import curriculum

    found = curriculum.run(curriculum.Chain(online[1] / "seed0", overrides=FEW), 7, "by success")
    assert 0 <= found["test/exact_match"] <= found["test/pass@8"] <= 1
    assert 0 <= found[curriculum.SIGNAL] <= 1
