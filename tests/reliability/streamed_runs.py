"""Runs `align fit` on streams from one process, each run in a fork of its own, so that the imports are paid once.

Usage: `python -m tests.reliability.streamed_runs RESULTS`, in the folder with the configurations. Each run ends as it
ends, also by a signal to itself; RESULTS/codes.json tells how.
"""

import json
import os
import signal
import sys
from pathlib import Path

from lightning.pytorch import Callback

from tests.forked import align, import_all

OPTIONS = {
    # blocks of 5 of 24 documents, packed; batches of 2 rows, and two of them a step
    "pretrain": ("--trainer.accumulate_grad_batches=2", "--trainer.max_steps=14"),
    # blocks of 5 of 12 prompts; four steps a batch
    "grpo": ("--model.num_iterations=2", "--model.minibatches=2", "--trainer.max_steps=32", "--data.batch_size=2"),
}
EVERY = {"pretrain": 4, "grpo": 8}  # optimizer steps between two checkpoints
TWO_RANKS = ("--trainer.strategy=ddp_fork", "--trainer.devices=2")


class EndAt(Callback):
    """Signals the whole group of processes at the start of a batch."""

    def __init__(self, step: int, signal: int, odd: bool = False):
        self.step, self.signal, self.odd = step, signal, odd

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step >= self.step and batch_idx % 2 == self.odd and trainer.is_global_zero:
            if self.signal == signal.SIGKILL:
                os.killpg(os.getpgrp(), self.signal)  # a rank does not lead the group
            os.kill(os.getpid(), self.signal)


class Rows(Callback):
    """Notes which rows each batch of each rank held."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        rows = batch["index"] if "index" in batch else batch["input_ids"].tolist()
        with open(Path(trainer.default_root_dir) / f"rows.{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps({"step": trainer.global_step, "batch": batch_idx, "rows": rows}) + "\n")


def run(paradigm, name, *options, workers, end=None, resume=None):
    root = RESULTS / paradigm / name
    root.mkdir(parents=True)
    saved = {"dirpath": str(root / "checkpoints"), "filename": "{step}", "every_n_train_steps": EVERY[paradigm]}
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": {**saved, "save_top_k": -1}},
        {"class_path": f"{MODULE}.Rows"},
    ]
    if end is not None:
        callbacks.append({"class_path": f"{MODULE}.EndAt", "init_args": end})
    arguments = ["fit", "--config", f"{paradigm}.yaml", "--data.stream.buffer_size=5", "--trainer.max_epochs=-1"]
    arguments += [f"--data.num_workers={workers}", *OPTIONS[paradigm], "--trainer.callbacks", json.dumps(callbacks)]
    arguments += ["--trainer.default_root_dir", str(root), *options]
    if resume is not None:
        arguments += ["--ckpt_path", str(resume)]
    CODES[f"{paradigm}/{name}"] = align(root / "log.txt", arguments, seconds=150)
    return root


def last(root):
    return max((root / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)


MODULE = "tests.reliability.streamed_runs"

if __name__ == "__main__":
    RESULTS, CODES = Path(sys.argv[1]), {}
    import_all("policy")
    for paradigm, step, odd in (("pretrain", 9, False), ("grpo", 18, True)):
        run(paradigm, "whole", workers=2)
        killed = run(paradigm, "killed", workers=2, end={"step": step, "signal": int(signal.SIGKILL), "odd": odd})
        for workers in (2, 0):
            run(paradigm, f"resumed_{workers}", workers=workers, resume=last(killed))
    # Lightning finishes the batch of the signal: the first of an optimizer step's two
    stopped = run("pretrain", "stopped", workers=2, end={"step": 9, "signal": int(signal.SIGTERM)})
    run("pretrain", "continued", workers=2, resume=last(stopped))
    run("pretrain", "two_whole", *TWO_RANKS, workers=1)
    killed = run("pretrain", "two_killed", *TWO_RANKS, workers=1, end={"step": 9, "signal": int(signal.SIGKILL)})
    run("pretrain", "two_resumed", *TWO_RANKS, workers=1, resume=last(killed))
    run("pretrain", "one_resumed", workers=1, resume=last(killed))
    (RESULTS / "codes.json").write_text(json.dumps(CODES))
