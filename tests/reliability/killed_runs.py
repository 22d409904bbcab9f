"""Runs `align fit` many times from one process, each in a fork of its own, so that the imports are paid once.

Usage: `python killed_runs.py RESULTS`, in the folder with the configurations. Each run ends as it ends, also by a
signal to itself; RESULTS/codes.json tells how.
"""

import json
import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from alignment_modules.cli import main
from alignment_modules.policies.load import build_policy, load_tokenizer

RESULTS = Path(sys.argv[1])
RECIPES = Path(__file__).parents[2] / "configs" / "recipes"  # the schedule is the recipe's own
SETTINGS = {
    # an optimizer step is two batches; epoch 1 goes from step 3 to step 6
    "sft": ["--trainer.max_epochs", "3", "--trainer.accumulate_grad_batches", "2"],
    # a batch is four optimizer steps; epoch 1 goes from step 12 to step 24
    "grpo": [
        "--trainer.max_epochs",
        "2",
        "--model.num_iterations",
        "2",
        "--model.minibatches",
        "2",
        "--model.micro_batch_size",
        "3",
        "--model.beta",
        "0.05",
        "--model.max_completion_length",
        "6",
    ],
}
EVERY, CHECKPOINT, KILL = {"sft": 2, "grpo": 4}, {"sft": 4, "grpo": 16}, {"sft": 5, "grpo": 20}


def align(log, arguments):
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["align", *arguments]
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(70)


def run(name, paradigm, *options, workers=0, kill=None, odd=False, resume=None):
    root = RESULTS / name
    root.mkdir(parents=True)
    checkpoint = {
        "dirpath": str(root / "checkpoints"),
        "filename": "{step}",
        "every_n_train_steps": EVERY[paradigm],
        "save_top_k": -1,
        "save_on_exception": True,
    }
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": checkpoint},
        {"class_path": "my_callbacks.Rows", "init_args": {"path": str(root / "rows.jsonl")}},
    ]
    if kill is not None:
        when = {"step": KILL[paradigm], "signal": int(kill), "odd": odd}
        callbacks.append({"class_path": "my_callbacks.KillAt", "init_args": when})
    arguments = ["fit", "--config", str(RECIPES / f"{paradigm}.yaml"), "--config", f"{paradigm}.yaml"]
    arguments += [*SETTINGS[paradigm], "--data.num_workers", str(workers)]
    arguments += ["--trainer.callbacks", json.dumps(callbacks), "--trainer.default_root_dir", str(root), *options]
    if resume is not None:
        arguments += ["--ckpt_path", str(resume)]
    process = multiprocessing.get_context("fork").Process(target=align, args=(root / "log.txt", arguments))
    process.start()
    process.join(timeout=120)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


if __name__ == "__main__":
    build_policy("policy")  # imports what a run imports
    load_tokenizer("policy")
    codes = {}
    for paradigm in ("sft", "grpo"):
        codes[f"{paradigm}_whole"] = run(f"{paradigm}_whole", paradigm)
        for workers in (0, 2):
            killed, resumed = f"{paradigm}_killed_{workers}", f"{paradigm}_resumed_{workers}"
            codes[killed] = run(killed, paradigm, workers=workers, kill=signal.SIGKILL)
            last = RESULTS / killed / "checkpoints" / f"step={CHECKPOINT[paradigm]}.ckpt"
            codes[resumed] = run(resumed, paradigm, workers=workers, resume=last)
    last = RESULTS / "sft_killed_0" / "checkpoints" / f"step={CHECKPOINT['sft']}.ckpt"
    codes["sft_other_seed"] = run("sft_other_seed", "sft", "--exact_resume.seed", "1", resume=last)
    # Lightning finishes the batch of the signal: the first of an optimizer step's two, or the second
    for name, odd in (("first", False), ("second", True)):
        codes[f"sft_stopped_{name}"] = run(f"sft_stopped_{name}", "sft", kill=signal.SIGTERM, odd=odd)
        written = (RESULTS / f"sft_stopped_{name}" / "checkpoints").iterdir()
        last = max(written, key=lambda path: path.stat().st_mtime_ns)
        codes[f"sft_continued_{name}"] = run(f"sft_continued_{name}", "sft", resume=last)
    (RESULTS / "codes.json").write_text(json.dumps(codes))
