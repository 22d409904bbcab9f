"""Runs `align fit` many times from one process, each in a fork of its own, so that the imports are paid once.

Usage: `python -m tests.contract.killed_runs`, in the folder with the configurations. Each line that it reads names a
paradigm and a folder for its results, and is answered with one when its runs are over. Each run ends as it ends, also
by a signal to itself; codes.json tells how.
"""

import functools
import json
import signal
import sys
from pathlib import Path

from tests.forked import align, import_all
from tests.paradigms import ROWS
from tests.row import Resume

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"  # the schedule is the recipe's own


MUON = ("--model.optimizer=MuonWithAdamW", "--model.optimizer.lr=0.01", "--trainer.callbacks+=PolicyAverage")
MUON += ("--trainer.callbacks.decay=0.8", "--export.unaveraged=true")
"""Muon, and an average of its steps."""


CURRICULA = {
    "sft": Resume(
        ("--trainer.max_epochs", "3", "--trainer.accumulate_grad_batches", "2", "--data.train", "uneven.jsonl",
         "--data.max_tokens", "28", "--data.curriculum", "ByLength", "--data.curriculum.mode", "admission",
         "--data.curriculum.start", "0.5", "--data.curriculum.steps", "12"),
        every=2, start=8, kill=9,
    ),
    "grpo": Resume(
        ("--trainer.max_epochs", "6", "--data.curriculum", "BySuccess", "--data.curriculum.low", "0.3",
         "--data.curriculum.high", "0.7", "--data.curriculum.decay", "0.1", "--model.max_completion_length", "3"),
        every=1, start=10, kill=13,
    ),
}  # fmt: skip
"""Rows that come by a curriculum: by length within a budget of tokens, and by success."""


def run(results, paradigm, name, *options, workers=0, kill=None, odd=False, resume=None, when=None):
    root, when = results / name, when or ROWS[paradigm].resume
    root.mkdir(parents=True)
    checkpoint = {
        "dirpath": str(root / "checkpoints"),
        "filename": "{step}",
        "every_n_train_steps": when.every,
        "save_top_k": -1,
        "save_on_exception": True,
    }
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": checkpoint},
        {"class_path": "my_callbacks.Rows", "init_args": {"path": str(root / "rows.jsonl")}},
    ]
    if kill is not None:
        moment = {"step": when.kill, "signal": int(kill), "odd": odd, "inside": when.inside}
        callbacks.append({"class_path": "my_callbacks.KillAt", "init_args": moment})
    arguments = ["fit", "--config", str(RECIPES / f"{paradigm}.yaml"), "--config", f"{paradigm}.yaml"]
    arguments += [*when.options, "--data.num_workers", str(workers)]
    arguments += ["--trainer.callbacks", json.dumps(callbacks), "--trainer.default_root_dir", str(root), *options]
    if resume is not None:
        arguments += ["--ckpt_path", str(resume)]
    return align(root / "log.txt", arguments, seconds=120)


def runs_of(results, paradigm):
    """All of a paradigm's runs, one after the other."""
    one, start = functools.partial(run, results, paradigm), ROWS[paradigm].resume.start
    codes = {"whole": one("whole")}
    for workers in (0, 2):
        codes[f"killed_{workers}"] = one(f"killed_{workers}", workers=workers, kill=signal.SIGKILL)
        last = results / f"killed_{workers}" / "checkpoints" / f"step={start}.ckpt"
        codes[f"resumed_{workers}"] = one(f"resumed_{workers}", workers=workers, resume=last)
    if paradigm == "sft":
        last = results / "killed_0" / "checkpoints" / f"step={start}.ckpt"
        codes["other_seed"] = one("other_seed", "--exact_resume.seed", "1", resume=last)
        # Lightning finishes the batch of the signal: the first of an optimizer step's two, or the second
        for name, odd in (("first", False), ("second", True)):
            codes[f"stopped_{name}"] = one(f"stopped_{name}", kill=signal.SIGTERM, odd=odd)
            written = (results / f"stopped_{name}" / "checkpoints").iterdir()
            last = max(written, key=lambda path: path.stat().st_mtime_ns)
            codes[f"continued_{name}"] = one(f"continued_{name}", resume=last)
        codes["averaged"] = one("averaged", *MUON)
        codes["averaged_killed"] = one("averaged_killed", *MUON, kill=signal.SIGKILL)
        last = results / "averaged_killed" / "checkpoints" / f"step={start}.ckpt"
        codes["averaged_resumed"] = one("averaged_resumed", *MUON, resume=last)
    if given := CURRICULA.get(paradigm):
        codes["curriculum"] = one("curriculum", workers=2, when=given)
        codes["curriculum_killed"] = one("curriculum_killed", workers=2, when=given, kill=signal.SIGKILL)
        last = results / "curriculum_killed" / "checkpoints" / f"step={given.start}.ckpt"
        codes["curriculum_resumed"] = one("curriculum_resumed", workers=2, when=given, resume=last)
    (results / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    import_all("policy")
    for line in sys.stdin:
        paradigm, results = line.split(maxsplit=1)
        runs_of(Path(results.strip()), paradigm)
        print("over", flush=True)
