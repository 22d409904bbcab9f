"""The benchmark of preparing data measures every case; its speed is not a test's business."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def tokenising(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tokenising")


def test_a_measured_process_prints_its_processor_time(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "tokenising.py"), "--measure", "ours", "--cases", "sft messages"]
    command += ["--folder", str(tmp_path), "--rows", "20", "--words", "200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    assert result["rows"] == 20
    assert result["seconds"] > 0


def test_ratios_are_those_within_a_round(tokenising, monkeypatch):
    times = {"ours": iter([1.0, 2.0, 5.0, 5.0]), "trl": iter([2.0, 8.0])}
    monkeypatch.setattr(tokenising, "execute", lambda library, case, options: next(times[library]))
    options = argparse.Namespace(cases=["sft", "prompts"], rows=9, rounds=2, trl_python="python")
    _, _, sft, prompts = tokenising.table(options)
    assert sft == "| sft | 1.500 [1.000, 2.000] | 5.000 [2.000, 8.000] | 0.375 [0.250, 0.500] |"
    assert prompts == "| prompts | 5.000 [5.000, 5.000] |  |  |"


def test_every_case_has_rows_that_ours_takes(tokenising, tmp_path):
    tokenising.write_tokenizer(tmp_path / "tokenizer", words=200)
    for case in tokenising.CASES:
        assert tokenising.ours(tokenising.prepare(tmp_path, case, 8), case, tmp_path) == 8
