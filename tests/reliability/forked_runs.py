"""Runs of `align fit`, each in a fork of one process; it ends as it ends, also by a signal to itself."""

import json
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from tests.forked import align, import_all

MODULE = __name__
TWO_RANKS = ("--trainer.strategy=ddp_fork", "--trainer.devices=2")


class EndAt(Callback):
    """Signals the whole group of processes at the start of a batch."""

    def __init__(self, step: int, signal: int, odd: bool = False):
        self.step, self.signal, self.odd = step, signal, odd

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step >= self.step and batch_idx % 2 == self.odd and trainer.is_global_zero:
            end(self.signal)


class Rows(Callback):
    """Notes which rows each batch of each rank held."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        rows = batch["index"] if "index" in batch else batch["input_ids"].tolist()
        with open(Path(trainer.default_root_dir) / f"rows.{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps({"step": trainer.global_step, "batch": batch_idx, "rows": rows}) + "\n")


def end(number):
    """Signals the processes of this run; SIGKILL reaches all ranks."""
    if number == signal.SIGKILL:
        os.killpg(os.getpgrp(), number)  # a rank does not lead the group
    os.kill(os.getpid(), number)


class Runs:
    """Runs whose folders are in `results`; how each ended is in `results/codes.json`, written by `save`."""

    def __init__(self, results):
        self.results, self.codes = Path(results), {}
        import_all("policy")

    def __call__(self, name, config, *options, every, callbacks=(), end=None, resume=None):
        """Runs one and returns its folder, which has `rows.RANK.jsonl`, `checkpoints` and `log.txt`.

        Args:
            name: Of the folder.
            config: Configuration file.
            *options: More arguments.
            every: Optimizer steps between two checkpoints.
            callbacks: Import paths of more callbacks.
            end: Options of `EndAt`.
            resume: A checkpoint.
        """
        root = self.results / name
        root.mkdir(parents=True)
        saved = {"dirpath": str(root / "checkpoints"), "filename": "{step}", "every_n_train_steps": every}
        given = [{"class_path": "ModelCheckpoint", "init_args": {**saved, "save_top_k": -1}}]
        given += [{"class_path": path} for path in (f"{MODULE}.Rows", *callbacks)]
        if end is not None:
            given.append({"class_path": f"{MODULE}.EndAt", "init_args": end})
        arguments = ["fit", "--config", config, "--trainer.callbacks", json.dumps(given)]
        arguments += ["--trainer.default_root_dir", str(root), *options]
        if resume is not None:
            arguments += ["--ckpt_path", str(resume)]
        self.codes[name] = align(root / "log.txt", arguments, seconds=150)
        return root

    def save(self):
        (self.results / "codes.json").write_text(json.dumps(self.codes))


def last(root):
    """The newest checkpoint of a run."""
    return max((root / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def rows(folder, rank=0):
    """What `Rows` noted of a rank."""
    return [json.loads(line) for line in (folder / f"rows.{rank}.jsonl").read_text().splitlines()]


def same_weights(one, other, start):
    """Two runs ended with the same bits, all of which have moved."""
    one, other = (load_file(folder / "export" / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    before = load_file(start / "model.safetensors")
    assert not any(torch.equal(value, before[name]) for name, value in one.items())
