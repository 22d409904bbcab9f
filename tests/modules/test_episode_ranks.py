"""Ranks whose episodes have other numbers of turns: nobody waits for ever, and the step is that of one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.rollouts.environments.conftest import acting_folder  # noqa: F401

ROOT = Path(__file__).parents[2]


def run(folder, output, devices, strategy):
    command = [sys.executable, "-m", "tests.modules.episode_ranks", folder, str(output), str(devices), strategy]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output / f"{strategy}.pt")


@pytest.fixture(scope="module")
def alone(acting_folder, tmp_path_factory):  # noqa: F811
    return run(acting_folder, tmp_path_factory.mktemp("alone"), 1, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_step_of_ranks_with_unequal_turns_is_that_of_one_process(acting_folder, tmp_path, alone, strategy):  # noqa: F811
    found = run(acting_folder, tmp_path, 2, strategy)
    for name, one in found.items():
        assert one["turns"][0] != one["turns"][1]
        assert one["steps"] == alone[name]["steps"] == 2
        for key, value in alone[name]["weights"].items():
            torch.testing.assert_close(one["weights"][key], value, atol=1e-5, rtol=0)
