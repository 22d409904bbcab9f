"""Runs on mixtures and with curricula. Usage: `python -m tests.reliability.mixed_runs RESULTS`, in the workplace."""

import json
import signal
import sys
from pathlib import Path

import yaml

from tests.reliability.forked_runs import TWO_RANKS, Runs, last
from tests.workplace import write_lines

KILL = int(signal.SIGKILL)
# two steps a batch; three epochs of the curriculum
OPTIONS = ("--model.num_iterations=2", "--data.batch_size=4", "--model.optimizer.lr=0.03")
SUCCESS = json.dumps({"class_path": "BySuccess", "init_args": {"low": 0.1, "high": 0.4, "decay": 0.3, "revisit": 0.3}})
CURRICULUM = (*OPTIONS, f"--data.curriculum={SUCCESS}", "--trainer.max_epochs=5")
EVERY = 4  # optimizer steps between two checkpoints


def mixture(paradigm, sources):
    """Writes a configuration on several sources of the workplace, and returns its name."""
    config = yaml.safe_load(Path(f"{paradigm}.yaml").read_text())
    kind = config["data"]["class_path"]
    options = {name: {"data": {"class_path": kind, "init_args": given}} for name, given in sources.items()}
    for number, source in enumerate(options.values()):
        source |= {"weight": 1.0 + number, "loss_weight": 1.0 - 0.25 * number}
    config["data"] = {"class_path": "MixtureDataModule", "init_args": {"sources": options, "batch_size": 4}}
    Path(f"{paradigm}_mixture.yaml").write_text(yaml.safe_dump(config))
    return f"{paradigm}_mixture.yaml"


if __name__ == "__main__":
    runs = Runs(sys.argv[1])
    supervised = mixture("sft", {"sums": {"train": "sft.jsonl"}, "uneven": {"train": "uneven.jsonl", "max_length": 12}})
    others = [{"prompt": f"{number}+{number}=", "answer": str(2 * number)} for number in range(20)]
    write_lines(Path("others.jsonl"), others)
    sampled = mixture("grpo", {"sums": {"train": "prompts.jsonl"}, "others": {"train": "others.jsonl"}})
    several = {
        "sft": (supervised, ("--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=3"), 9),
        "grpo": (sampled, ("--model.num_iterations=2", "--trainer.max_epochs=2"), 10),
    }
    for name, (config, options, step) in several.items():
        options = (*options, "--data.num_workers=2")
        runs(f"{name}/whole", config, *options, every=EVERY)
        end = {"step": step, "signal": KILL, "odd": True}
        killed = runs(f"{name}/killed", config, *options, every=EVERY, end=end)
        runs(f"{name}/resumed", config, *options, every=EVERY, resume=last(killed))

    def admitted(name, *options, **more):
        return runs(f"curriculum/{name}", "grpo.yaml", *CURRICULUM, *options, every=EVERY, **more)

    one, two = "--data.num_workers=1", ("--data.num_workers=1", "--data.batch_size=2", *TWO_RANKS)
    admitted("one", one)
    runs("curriculum/plain", "grpo.yaml", *OPTIONS, "--trainer.max_epochs=5", one, every=EVERY)
    admitted("two", *two)
    killed = admitted("two_killed", *two, end={"step": 18, "signal": KILL, "odd": False})
    admitted("two_resumed", *two, resume=last(killed))
    runs.save()
