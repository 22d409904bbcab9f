"""The benchmark of environments at a tiny size: its commands run; what they reach is for the slow test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ONCE = ("--trainer.max_steps", "1", "--model.lr_scheduler", "null", "--data.train.init_args.size", "16")
FEW = (
    *(*ONCE, "--data.batch_size", "2", "--data.test.init_args.size", "3", "--model.evaluation.num_samples", "1"),
    *(
        "--model.max_turns",
        "2",
        "--model.max_completion_length",
        "20",
        "--model.evaluation.max_completion_length",
        "20",
    ),
)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The benchmark, and its chain, whose stages before the methods took one step each."""
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
    import environments

    root = tmp_path_factory.mktemp("environments")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", sys.argv[:1])
        environments.Environments(root, ONCE).prepare()
        yield environments, environments.Environments(root, FEW)


def test_the_start_is_measured_with_the_tool_and_the_decoy(benchmark):
    environments, chain = benchmark
    start = chain.start()
    assert list(start) == [environments.START, environments.BLIND_START]
    assert all(0 <= found["solved"] <= 1 for found in start.values())


@pytest.mark.parametrize("number", [1, 3])
def test_a_method_is_trained_and_measured_once(benchmark, number):
    """PPO, and GRPO with the decoy."""
    environments, chain = benchmark
    name = [*environments.METHODS][number]
    found = chain.run_seed(7, [name])
    assert found[name].keys() == {"solved", "greedy", "calls", "seconds"}
    assert json.loads((chain.root / "seed7" / "results.json").read_text())[name] == found[name]
    assert chain.run_seed(7, [name]) == found


def test_bars(benchmark):
    environments, chain = benchmark
    start = {
        environments.START: {"solved": 0.4, "calls": 6.0},
        environments.BLIND_START: {"solved": 0.04, "calls": 6.0},
    }
    good, bad = {"solved": 0.75, "calls": 5.0}, {"solved": 0.65, "calls": 6.5}

    def held(run):
        return list(environments.bars(start, {0: run}, chain.root).values())

    assert held({"GRPO": good, environments.BLIND: {"solved": 0.05}}) == [[True], [True], [True]]
    assert held({"GRPO": bad, environments.BLIND: {"solved": 0.08}}) == [[False], [False], [False]]


@pytest.mark.slow
def test_bars_hold_on_another_seed(tmp_path):
    """From a fresh policy to GRPO and a control; the script exits with 1 where a bar is missed. PPO takes longer."""
    frozen = "control: GRPO with learning rate 0"
    command = [sys.executable, "benchmarks/environments.py", "--seeds", "3", "--root", str(tmp_path)]
    command += ["--methods", "GRPO", frozen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("held:") == 3
