"""The user's folder, `align` in it, and runs that end in every way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workplace import align, workplace  # noqa: F401


@pytest.fixture(scope="module")
def runs(request, workplace, tmp_path_factory):  # noqa: F811
    """`runs(name, code)`: the folder of a run of the program `RUNS` of the test's module that ended so."""
    results = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", request.module.RUNS, str(results)]
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    codes = json.loads((results / "codes.json").read_text())

    def find(name, code=0):
        assert codes[name] == code, (results / name / "log.txt").read_text()[-3000:]
        return results / name

    return find
