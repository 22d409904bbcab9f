"""A folder as a user would have it: a tiny model with its tokenizer, JSONL files, own rewards and callbacks."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml

from tests.paradigms import ROWS

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
FILES = {
    "documents": "text.jsonl",
    "demonstrations": "sft.jsonl",
    "pairs": "preference.jsonl",
    "labelled": "labelled.jsonl",
    "questions": "prompts.jsonl",
}
CHARACTERS = list("0123456789+= abcdefghijklmnopqrstuvwxyz")

REWARDS = '''
def digits(completions):
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]

def raises(completions):
    return [1 / (len(text) - len(text)) for text in completions]

def too_few(completions):
    return [1.0]

def never_a_number(completions):
    return [float("nan")] * len(completions)

def a_word(completions):
    return ["good"] * len(completions)

def wants_a_column(completions, solution):
    return [0.0] * len(completions)

class FailsLater:
    """Fails on the last of the prompts."""

    def __call__(self, completions, prompts):
        if any("2+3" in prompt for prompt in prompts):
            raise ZeroDivisionError("no reward for 2+3")
        return [1.0] * len(completions)
'''

CALLBACKS = '''
import json, os, signal
from lightning.pytorch import Callback

class Rows(Callback):
    """Notes which rows each training batch held, as they come."""

    def __init__(self, path: str):
        self.path = path

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        rows = batch["index"] if "index" in batch else batch["input_ids"].tolist()
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": trainer.global_step, "epoch": trainer.current_epoch, "rows": rows}) + "\\n")

class Marks(Callback):
    """Leaves a file when a batch has been trained on."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        open(os.path.join(trainer.default_root_dir, "trained"), "w").close()

class KillAt(Callback):
    """Ends its own process in the middle of an epoch, at the start of a batch or at an optimizer step inside one."""

    def __init__(self, step: int, signal: int, odd: bool = False, inside: bool = False):
        self.step, self.signal, self.odd, self.inside = step, signal, odd, inside

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.inside and trainer.global_step >= self.step:
            assert trainer.current_epoch >= 1
            os.kill(os.getpid(), self.signal)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if not self.inside and trainer.global_step >= self.step and (batch_idx % 2 or not self.odd):
            assert trainer.current_epoch >= 1 and batch_idx > 0
            os.kill(os.getpid(), self.signal)
'''


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def workplace(write_model, tmp_path_factory):
    """The folder. Its policy has attention dropout, so that training depends on random numbers."""
    folder = tmp_path_factory.mktemp("workplace")
    config = {"intermediate_size": 24, "attention_dropout": 0.2}
    write_model(folder / "policy", CHARACTERS, **config)
    write_model(folder / "other", vocabulary=3 + len(CHARACTERS), seed=1, **config)
    write_model(folder / "small", vocabulary=10, seed=2, **config)
    sums = [(a, b) for a in range(6) for b in range(4)]
    write_lines(folder / "sft.jsonl", [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in sums])
    uneven = [{"prompt": f"{a}+{b}=" * (a % 3 + 1), "completion": str(a + b)} for a, b in sums]
    write_lines(folder / "uneven.jsonl", uneven)
    write_lines(
        folder / "preference.jsonl",
        [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a, b in sums],
    )
    write_lines(
        folder / "labelled.jsonl",
        [{"prompt": f"{a}+{b}=", "completion": str(a + b + a % 2), "label": a % 2 == 0} for a, b in sums],
    )
    write_lines(folder / "prompts.jsonl", [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums[:12]])
    write_lines(folder / "text.jsonl", [{"text": f"{a}+{b}={a + b}"} for a, b in sums])
    (folder / "my_rewards.py").write_text(REWARDS)
    (folder / "my_callbacks.py").write_text(CALLBACKS)
    trainer = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "callbacks": [{"class_path": "my_callbacks.Marks"}],
    }
    for name, row in ROWS.items():
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        options = {"policy": "policy", "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}}
        options |= row.needs
        if row.kind == "acting":
            options |= {"rewards": "my_rewards.digits", "num_generations": 3, "max_completion_length": 4}
        data = {"train": FILES[row.source], "batch_size": 2 if row.source == "documents" else 4, "max_length": 16}
        whole = {
            "trainer": trainer,
            "model": {"class_path": recipe["model"]["class_path"], "init_args": options},
            "data": {"class_path": recipe["data"]["class_path"], "init_args": data},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    return folder


@pytest.fixture(scope="session")
def align(workplace, tmp_path_factory):
    """Runs `align` in this process, in the user's folder; returns exit code, standard error, error and run folder."""
    from alignment_modules.cli import main

    def run(*arguments):
        stream, code, error, root = io.StringIO(), 0, None, tmp_path_factory.mktemp("run")
        given = [str(argument) for argument in arguments]
        if given and given[0] in ("fit", "test", "validate", "predict") and "--trainer.default_root_dir" not in given:
            given += ["--trainer.default_root_dir", str(root)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.chdir(workplace))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(stream))
            stack.enter_context(mock.patch.object(sys, "argv", ["align"]))
            stack.enter_context(mock.patch.object(sys, "path", list(sys.path)))
            stack.enter_context(mock.patch.dict(os.environ))
            for name in ("my_rewards", "my_callbacks"):  # another folder's, of another test
                sys.modules.pop(name, None)
            try:
                main(given)
            except SystemExit as end:
                code = end.code
            except Exception as raised:
                code, error = 1, raised
        return SimpleNamespace(code=code, text=stream.getvalue(), error=error, root=root)

    return run
