"""Two ranks of one machine: one makes the tables, both map them, and both meet a bad row."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, time
sys.path[:0] = {paths!r}
from test_lightning import Recorder, trainer
from conftest import build_tokenizer
from datamodules import CacheOptions, PromptDataModule
from datamodules.cache import building
folder, building.ROWS_OF_A_PART = sys.argv[1], 50
make = building.Building.make

def made(self, place):
    with open(folder + "/made", "a") as file:
        file.write("once\\n")
    return make(self, place)

building.Building.make = made
kept = CacheOptions(folder=folder + "/cache", num_proc=2, least_rows=10)
for name, cache, rows in (("disk", kept, "rows"), ("memory", None, "rows"), ("bad", kept, "bad")):
    module, run = Recorder(), trainer(folder, devices=2, strategy="ddp", max_epochs=1)
    data = PromptDataModule(train=f"{{folder}}/{{rows}}.jsonl", tokenizer=build_tokenizer(), cache=cache)
    try:
        run.fit(module, datamodule=data)
        found = module.seen
    except ValueError as error:
        found = str(error)
    with open(f"{{folder}}/{{name}}-{{run.global_rank}}.json", "w") as file:
        json.dump(found, file)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks(tmp_path):
    tests = Path(__file__).parents[1]
    rows = [{"prompt": f"{number}+1="} for number in range(130)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, [*rows[:70], {"prompt": 3}, *rows[71:]])))
    (tmp_path / "script.py").write_text(SCRIPT.format(paths=[str(tests), str(tests.parents[1])]))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = {
        name: [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for name in ("disk", "memory", "bad")
    }
    assert seen["disk"] == seen["memory"]
    assert sum(len(index) for rank in seen["disk"] for *_, index in rank) == 130
    assert seen["bad"][0] == seen["bad"][1]
    assert "bad.jsonl:71: " in seen["bad"][0]
    assert (tmp_path / "made").read_text().count("once") == 1 + 3  # the bad rows: before, and in each rank's setup
