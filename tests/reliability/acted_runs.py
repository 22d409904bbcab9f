"""Runs of GRPO and PPO on an environment, of which some are killed in an episode, between two turns of the policy.

Usage: `python -m tests.reliability.acted_runs RESULTS`, in the workplace, which has a folder `acting`.
"""

import json
import signal
import sys
from pathlib import Path

import yaml
from lightning.pytorch import Callback

from tests.reliability.forked_runs import Runs, end, last
from tests.rollouts.environments.acting import Sum
from tests.workplace import write_lines

MODULE = "tests.reliability.acted_runs"
EVERY = 4  # optimizer steps between two checkpoints
KILLED = 9  # two optimizer steps a batch


class Steps(Callback):
    """Tells the environments how far the run is."""

    now = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        Steps.now = trainer.global_step


class Deadly(Sum):
    """Ends the process in the second turn of an episode of a step.

    Args:
        step: Optimizer steps before; None: never.
    """

    def __init__(self, step: int | None = None):
        self.step = step

    def add(self, number: int) -> str:
        """Adds a number.

        Args:
            number: The number.
        """
        if self.step is not None and Steps.now >= self.step and self.turns == 2:
            Path("killed.txt").write_text(f"step {Steps.now}, turn {self.turns}")
            end(signal.SIGKILL)
        return super().add(number)


def configuration(paradigm):
    """Writes a configuration, and returns its name."""
    config = yaml.safe_load(Path(f"{paradigm}.yaml").read_text())
    options = config["model"]["init_args"] | {
        "policy": "acting",
        "rewards": None,
        "max_completion_length": 60,
        "max_turns": 4,
        "num_iterations": 2,
        "tool_options": {"format": "tests.rollouts.environments.acting.LettersFormat"},
    }
    config["model"]["init_args"] = options
    config["data"]["init_args"] |= {"train": "goals.jsonl", "max_length": 64}
    Path(f"{paradigm}_acting.yaml").write_text(yaml.safe_dump(config))
    return f"{paradigm}_acting.yaml"


if __name__ == "__main__":
    runs = Runs(sys.argv[1])
    goals = [{"prompt": [{"role": "user", "content": f"Row {n}."}], "goal": 3 + n % 9} for n in range(24)]
    write_lines(Path("goals.jsonl"), goals)
    for paradigm in ("grpo", "ppo"):
        config = configuration(paradigm)

        def run(name, paradigm=paradigm, config=config, step=None, resume=None):
            environment = {"class_path": f"{MODULE}.Deadly", "init_args": {"step": step}}
            options = (f"--model.environments={json.dumps(environment)}", "--trainer.max_epochs=2")
            common = {"every": EVERY, "callbacks": [f"{MODULE}.Steps"], "resume": resume}
            return runs(f"{paradigm}/{name}", config, *options, **common)

        run("whole")
        killed = run("killed", step=KILLED)
        run("resumed", resume=last(killed))
    runs.save()
