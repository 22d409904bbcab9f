"""The measured processes of the benchmark run and report; their speed is not a test's business."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all cases: the workload is written once."""
    return tmp_path_factory.mktemp("workload")


@pytest.mark.parametrize(
    "options",
    [
        ["sft"],
        ["grpo", "--bare"],
        ["dpo", "--variant", "cached"],
        ["grpo", "--check"],
        ["grpo", "--beta", "0.04", "--profile", "3"],
    ],
    ids=" ".join,
)
def test_a_measured_run_reports_every_step(options, folder):
    command = [sys.executable, str(BENCHMARKS / "run_ours.py"), *options, "--folder", str(folder), "--threads", "1"]
    done = subprocess.run([*command, "--steps", "1", "--warmup", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    assert [math.isfinite(loss) for loss in result["losses"]] == [True, True]
    assert result["tokens_per_second"] > 0
    assert result["peak_mb"] > result["baseline_mb"]
    assert bool(result["profile"]) == ("--profile" in options)


def test_an_unknown_variant_is_refused():
    command = [sys.executable, str(BENCHMARKS / "run_ours.py"), "sft", "--variant", "cached"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "--variant cached: sft has default" in done.stderr


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_the_memory_of_a_divergence_is_measured_both_ways(kind):
    sizes = ["--tokens", "64", "--hidden", "8", "--vocabulary", "3000", "--threads", "1"]
    command = [sys.executable, str(BENCHMARKS / "divergence_memory.py"), *sizes, "--kind", kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| chunked |" in done.stdout
    assert "| plain |" in done.stdout
    assert float(done.stdout.split()[-1]) < 1e-4
