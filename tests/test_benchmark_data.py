"""The benchmark of starts measures each in a process of its own; its speed is not a test's business."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "data.py"


@pytest.mark.slow
def test_every_start_is_measured(tmp_path):
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path), "--rows", "40", "--words", "200"]
    done = subprocess.run([*command, "--processes", "1"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    head, names, *lines = done.stdout.splitlines()
    assert head.startswith("40 rows, ")
    assert names.split()[:3] == ["start", "CPU", "s"]
    found = {line[:12].strip(): [float(number) for number in line[12:].split()] for line in lines}
    assert list(found) == ["memory", "first", "second", "two ranks"]
    assert all(len(numbers) == 5 and numbers[0] > 0 for numbers in found.values())
    assert len([place for place in (tmp_path / "cache").iterdir() if len(place.name) == 32]) == 2
