"""The whole quickstart with its controls on one seed: the policy learns what it should, and only then."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_bar_holds_on_another_seed(tmp_path):
    """Pretrain, SFT, DPO, GRPO, learning rate 0 and shuffled rewards; the script exits with 1 where a bar is missed."""
    command = [sys.executable, "benchmarks/accuracy.py", "--seeds", "3", "--root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("held:") == 7
