"""Runs on an environment, of which some are killed in an episode, between two turns of the policy.

Usage: `python -m tests.reliability.acted_runs RESULTS`, in the workplace, which has folders `acting` and `teaching`.
"""

import json
import signal
import sys
from pathlib import Path

import yaml
from lightning.pytorch import Callback

from tests.episodes import Unjudged
from tests.reliability.forked_runs import Runs, end, last
from tests.rollouts.environments.acting import Sum
from tests.workplace import write_lines

MODULE = "tests.reliability.acted_runs"
EVERY = 4  # optimizer steps between two checkpoints
KILLED = 9
STEPS = {"grpo": 2, "ppo": 2, "online_dpo": 1, "distillation": 1}  # optimizer steps of a batch


class Steps(Callback):
    """Tells the environments how far the run is."""

    now = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        Steps.now = trainer.global_step


def die(step, turn):
    """Ends the process from a number of optimizer steps on, in the second turn of an episode."""
    if step is not None and Steps.now >= step and turn == 2:
        with open("killed.txt", "a") as file:  # another thread's call may be as far
            file.write(f"step {Steps.now}, turn {turn}")
        end(signal.SIGKILL)


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
        die(self.step, self.turns)
        return super().add(number)


class DeadlyUnjudged(Unjudged):
    """The same where nobody judges.

    Args:
        step: Optimizer steps before; None: never.
    """

    def __init__(self, step: int | None = None):
        self.step = step

    def reset(self, goal: int) -> str:
        self.calls = 0
        return super().reset(goal)

    def add(self, number: int) -> str:
        """Adds a number.

        Args:
            number: The number.
        """
        self.calls += 1
        die(self.step, self.calls)
        return super().add(number)


ENVIRONMENTS = {"distillation": "DeadlyUnjudged"}  # of others: Deadly


def configuration(paradigm):
    """Writes a configuration, and returns its name."""
    config = yaml.safe_load(Path(f"{paradigm}.yaml").read_text())
    options = config["model"]["init_args"] | {
        "policy": "acting",
        "max_completion_length": 60,
        "max_turns": 4,
        "tool_options": {"format": "tests.rollouts.environments.acting.LettersFormat"},
    }
    data = {"train": "goals.jsonl", "max_length": 64}
    if paradigm == "distillation":
        options |= {"teacher": "teaching", "on_policy_share": 1.0}
        data |= {"train": "answered.jsonl", "carry": ["goal", "prompt"]}
    else:
        options["rewards"] = None
    if STEPS[paradigm] == 2:
        options["num_iterations"] = 2
    config["model"]["init_args"] = options
    config["data"]["init_args"] |= data
    Path(f"{paradigm}_acting.yaml").write_text(yaml.safe_dump(config))
    return f"{paradigm}_acting.yaml"


if __name__ == "__main__":
    runs = Runs(sys.argv[1])
    goals = [{"prompt": [{"role": "user", "content": f"Row {n}."}], "goal": 3 + n % 9} for n in range(24)]
    write_lines(Path("goals.jsonl"), goals)
    answer = {"completion": [{"role": "assistant", "content": "7"}]}
    write_lines(Path("answered.jsonl"), [row | answer for row in goals])
    for paradigm in STEPS:
        config = configuration(paradigm)

        def run(name, paradigm=paradigm, config=config, step=None, resume=None):
            path = f"{MODULE}.{ENVIRONMENTS.get(paradigm, 'Deadly')}"
            environment = {"class_path": path, "init_args": {"step": step}}
            options = (f"--model.environments={json.dumps(environment)}", "--trainer.max_epochs=2")
            common = {"every": EVERY, "callbacks": [f"{MODULE}.Steps"], "resume": resume}
            return runs(f"{paradigm}/{name}", config, *options, **common)

        run("whole")
        killed = run("killed", step=KILLED)
        run("resumed", resume=last(killed))
    runs.save()
