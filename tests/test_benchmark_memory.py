"""The memory of runs: what is estimated stands in the documentation, and a run is measured beside it."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "distributed.md").read_text()


@pytest.fixture
def memory(monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("memory")


def lines(size):
    return [line for line in PAGE.splitlines() if line.startswith(f"| {size} |")]


def test_the_page_has_every_estimate(memory):
    head = f"| size | trained | {' | '.join(memory.COLUMNS)} |"
    assert head in PAGE
    for size in memory.SHAPES:
        assert [line.split(" | ")[1] for line in lines(size)] == list(memory.WAYS)


@pytest.mark.parametrize(
    ("size", "way"),
    [("0.5B", "LoRA, base in 4 bits"), ("7B", "all weights, float32")]
    + [
        pytest.param(size, way, marks=pytest.mark.slow)
        for size in ("0.5B", "1.5B", "7B", "32B")
        for way in ("all weights, float32", "all weights, bfloat16", "LoRA, base in bfloat16", "LoRA, base in 4 bits")
    ],
)
def test_the_page_says_what_is_estimated(size, way, memory):
    assert list(memory.estimates(size, [way])) == [line for line in lines(size) if f"| {way} |" in line]


@pytest.mark.slow
def test_what_was_measured_stands_beside_the_estimate(memory):
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if re.match(r"\| (all weights|LoRA) \|", line)]
    assert [tuple(row[:2]) for row in rows] == [(way, method) for way in memory.MEASURED for method in memory.METHODS]
    for way, method, *numbers in rows:
        counted, held, more = (int(number.replace(",", "")) for number in numbers)
        found = memory.estimated(method, {**memory.config_of("135m"), **memory.MEASURED[way]}).total / 1e6
        assert counted == round(found), (way, method)
        assert held - counted == more > 0


def test_what_stands_for_others_holds_as_much(memory):
    """Without a reference SFT, ORPO, CPO and GRPO; with one DPO, KTO, online DPO and GRPO."""
    policy = memory.config_of("7m")
    memory.METHODS |= {
        "ORPO": ("ORPOModule", {}),
        "CPO": ("CPOModule", {}),
        "KTO": ("KTOModule", {}),
        "online DPO": ("OnlineDPOModule", {"rewards": memory.never_called}),
    }
    held = {method: memory.estimated(method, policy).total for method in memory.METHODS}
    assert held["SFT"] == held["ORPO"] == held["CPO"] == held["GRPO"] == pytest.approx(held["DPO"] * 4 / 5, rel=1e-5)
    assert held["DPO"] == held["KTO"] == held["online DPO"] == held["GRPO, `beta` 0.04"]
    assert held["PPO, `critic` shared"] == pytest.approx(held["DPO"], rel=1e-3)  # the head beside it
    # weights and optimizer states of a critic, and gradients of one of them at a time
    assert held["PPO"] == pytest.approx(held["DPO"] + held["SFT"] * 3 // 4, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SFT", "DPO", "GRPO, `beta` 0.04", "PPO"])
def test_a_measured_run_holds_at_least_what_is_estimated(method, memory):
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--size", "7m", "--tokens", "8"]
    done = subprocess.run(
        [*command, "--method", method, "--way", "all weights"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    held = json.loads(line.removeprefix("RESULT "))["megabytes"]
    counted = memory.estimated(method, memory.config_of("7m")).total / 1e6
    assert counted < held < counted + 200
