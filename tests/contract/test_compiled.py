"""Training on layers that torch's own compiler compiled gives the weights of eager ones, on one process and on two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.compiled_ranks import CASES

ROOT = Path(__file__).parents[2]


def run(folder, devices, how):
    command = [sys.executable, "-m", "tests.contract.compiled_ranks", str(folder), str(devices), how]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "_orig_mod" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    return run(tmp_path_factory.mktemp("eager"), 1, "eager")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return {devices: run(tmp_path_factory.mktemp(f"compiled{devices}"), devices, "compiled") for devices in (1, 2)}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_same_weights_as_eager(eager, compiled, case, devices):
    expected, found = (torch.load(folder / f"{case}.pt", weights_only=True) for folder in (eager, compiled[devices]))
    tolerance = 2e-2 if "bf16" in case else 1e-5  # eager and compiled layers round to bfloat16 at other places
    assert max(float(value.abs().max()) for value in expected["change"].values()) > 1e-3
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    for key, value in expected["change"].items():
        torch.testing.assert_close(
            found["change"][key], value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )
