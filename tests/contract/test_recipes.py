"""Every recipe, with its own settings, goes on from a checkpoint as if it had never been stopped."""

import csv
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.paradigms import ROWS
from tests.workplace import FILES

REPOSITORY = Path(__file__).parents[2]
OPTIONS = {
    "documents": ["--trainer.accumulate_grad_batches", "3", "--data.max_length", "4"],
    "demonstrations": ["--trainer.accumulate_grad_batches", "2"],
    "questions": ["--model.rewards", "my_rewards.digits", "--model.num_iterations", "2", "--model.num_generations", "3",
                  "--model.max_completion_length", "4"],
}  # fmt: skip


@pytest.fixture
def recipe(align, workplace, tmp_path):
    """Runs a recipe; gives its rows, its last checkpoint, and what it logged but times."""

    def run(name, root, *more):
        source = ROWS[name].source
        checkpoint = {"dirpath": str(root / "kept"), "filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
        callbacks = [
            {"class_path": "ModelCheckpoint", "init_args": checkpoint},
            {"class_path": "my_callbacks.Rows", "init_args": {"path": str(root / "rows.jsonl")}},
        ]
        logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(root), "name": "", "version": "csv"}}
        given = ["--config", REPOSITORY / "configs" / "recipes" / f"{name}.yaml", "--model.policy.path", "policy"]
        given += ["--data.train", FILES[source], "--data.batch_size", "3", "--trainer.log_every_n_steps", "3"]
        given += [f"--model.{key}={value}" for key, value in ROWS[name].needs.items()]
        given += OPTIONS.get(source, [])
        given += ["--trainer.callbacks", json.dumps(callbacks), "--trainer.logger", json.dumps(logger)]
        given += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", root / "root", *more]
        root.mkdir()
        result = align("fit", *given)
        assert result.code == 0, result.text
        rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
        last = max((root / "kept").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return rows, torch.load(last, weights_only=True), logged(root)

    run.folder = tmp_path
    return run


def logged(root):
    """The last number logged of each name at each step."""
    with open(root / "csv" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(int(row["step"]), name): float(value) for row in rows for name, value in row.items() if value}
    return {key: value for key, value in found.items() if "time/" not in key[1] and "per_second" not in key[1]}


@pytest.mark.parametrize("name", ROWS)
def test_goes_on_from_a_random_step(recipe, name):
    rows, end, metrics = recipe(name, recipe.folder / "whole")
    assert len(metrics) > 5
    steps = sorted(int(path.stem.removeprefix("step=")) for path in (recipe.folder / "whole" / "kept").iterdir())
    for step in random.Random(name).sample(steps[:-1], 2):
        checkpoint = recipe.folder / "whole" / "kept" / f"step={step}.ckpt"
        again, after, more = recipe(name, recipe.folder / f"from_{step}", "--ckpt_path", checkpoint)
        assert again == rows[len(rows) - len(again) :]
        assert again[0]["step"] == step
        assert rows[len(rows) - len(again) - 1]["step"] < step
        assert same(after["state_dict"], end["state_dict"])
        assert same(after["optimizer_states"], end["optimizer_states"])
        assert same(after["lr_schedulers"], end["lr_schedulers"])
        later = {key: value for key, value in metrics.items() if key[0] >= step}
        # the checkpoint's own step: logged before it was written, unless the end of the epoch logs it
        assert more == {key: value for key, value in later.items() if key[0] > step or key in more}
        by_interval = step == 1 or step % 3 == 0
        assert ((step, "train/loss") in more) == (not by_interval and (step, "train/loss") in metrics)


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (isinstance(left, float) and math.isnan(left) and math.isnan(right))


@pytest.mark.slow
@pytest.mark.distributed
def test_sixty_random_kills(tmp_path):
    """SIGKILL at any moment, with and without loader workers, in one process and two."""
    script = REPOSITORY / "benchmarks" / "resume.py"
    command = [sys.executable, str(script), "--kills", "60", "--folder", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
