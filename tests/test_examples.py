"""The example scripts are short, run as a user runs them, and learn."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ("dpo_with_your_model", "own_loop", "pieces_in_your_module", "two_processes")


def run(name, folder, *arguments):
    """What a script prints; a hang, of a second process too, is a failure."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, errors = process.communicate(timeout=300)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-4000:]
    return out


@pytest.mark.parametrize("name", SHORT)
def test_at_most_60_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60


def test_dpo_with_your_model_learns_to_prefer(tmp_path):
    found = re.search(r"chosen preferred in (\d+)% of the pairs, margin (\S+)", run("dpo_with_your_model", tmp_path))
    assert int(found[1]) == 100
    assert float(found[2]) > 1


@pytest.mark.slow
def test_own_loop_learns_to_halve_what_is_left(tmp_path):
    found = re.search(r"^games won: (\d+)%, after training (\d+)%$", run("own_loop", tmp_path), flags=re.MULTILINE)
    assert int(found[1]) < 40
    assert int(found[2]) > 85


@pytest.mark.parametrize(
    "name", ["pieces_in_your_module", pytest.param("two_processes", marks=[pytest.mark.distributed, pytest.mark.slow])]
)
def test_the_loss_falls(name, tmp_path):
    found = re.findall(r"^loss (\S+)$", run(name, tmp_path), flags=re.MULTILINE)
    assert len(found) == 1  # rank 0 alone reports
    assert float(found[0]) < 0.2  # guessing among 32 tokens costs 3.47


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_take_the_steps_of_one(tmp_path):
    losses = [
        [
            *map(
                float,
                re.findall(r"^step \d: (\S+)$", run("two_processes", tmp_path, f"--processes={count}"), flags=re.M),
            )
        ]
        for count in (1, 2)
    ]
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is missing")
def test_spell_backward_runs(tmp_path):
    out = run("spell_backward", tmp_path, "--sft-steps=2", "--grpo-steps=1")
    assert len(re.findall(r"^after \w+: \d+\.\d% right, mean score 0\.\d+$", out, flags=re.MULTILINE)) == 2
