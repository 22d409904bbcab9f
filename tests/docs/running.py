"""Runs the commands of a page in its order, in the folder where the test stands."""

import contextlib
import glob
import importlib.metadata
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from alignment_modules.cli import run_cli
from alignment_modules.cli.commands import COMMANDS, run_command
from tests.docs.pages import ROOT

QUIET = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false")
SUBCOMMANDS = ("fit", "validate", "test", "predict")
STOPS = re.compile(r"^--(print_config|help|\w+\.help|(\w+\.)*help)(=|$)|^-h$")
# What needs more than this process, or minutes; other tests run it.
LARGE = re.compile(
    r"--trainer\.(devices|num_nodes|strategy)|--config[ =](\S*/)?(ddp|fsdp2)\b"
    r"|--config[ =](configs/)?(engines|quickstart|environments)/"
)
ONLINE = re.compile(r"\b(grpo|ppo|online_dpo)\b")
# Programs of others, or of the shell: what they do is not told by this project.
OTHERS = ("cd", "chromium", "export", "git", "ls", "mkdir", "pytest", "source", "tensorboard", "unzip", "vllm")


def source(script):
    """A script's text, with that of the scripts beside it that it imports."""
    text = (ROOT / script).read_text()
    beside = (ROOT / script).parent
    imported = re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE)
    return text + "".join((beside / f"{name}.py").read_text() for name in imported if (beside / f"{name}.py").exists())


def check_script(script, arguments):
    """A script of the repository has the options that a command gives it."""
    assert (ROOT / script).exists(), script
    for option in (word.split("=")[0] for word in arguments if word.startswith("--")):
        assert f'"{option}"' in source(script), f"{script} has no {option}"


def check_install(arguments):
    """`pip install` names extras that there are."""
    extras = set(importlib.metadata.metadata("alignment-modules").get_all("Provides-Extra"))
    for word in arguments:
        if re.match(r"(\.|alignment[-_]modules)\S*\[", word):
            assert set(re.search(r"\[(.*)\]", word)[1].split(",")) <= extras, word


def run_line(line, *, fits, before=lambda folder, command: None):
    """Runs a command, or checks what of it can be checked: only `align` runs in this process.

    Args:
        line: The command.
        fits: Whether training, evaluation and what builds on them run; else they are parsed.
        before: Is told the folder and each command of `align` before it runs.
    """
    program, *arguments = shlex.split(line, comments=True)
    while "=" in program:  # an environment variable
        name, _, value = program.partition("=")
        os.environ[name] = value
        program, *arguments = arguments
    if program in ("torchrun", "srun", "accelerate"):
        program, arguments, fits = "align", arguments[arguments.index("align") + 1 :], False
    if program in OTHERS:
        return
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
    elif program == "pip" or arguments[:2] == ["-m", "pip"] or arguments[:2] == ["-m", "venv"]:
        check_install(arguments)
    elif program == "python":
        check_python(arguments)
    else:
        assert program == "align", line
        before(Path.cwd(), line)
        paths = [path for word in arguments for path in (sorted(glob.glob(word)) if "*" in word else [word])]
        run_align(line, paths, fits=fits)


def check_python(arguments):
    """Scripts of the repository are tested elsewhere (tests/examples, tests/test_benchmarks.py); a page's own runs."""
    script = arguments[0]
    if Path(script).parts[0] in ("examples", "benchmarks"):
        check_script(script, arguments[1:])
        return
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def run_align(line, arguments, *, fits):
    """Runs a command of `align` to its end."""
    name = arguments[0]
    if name == "list" or any(STOPS.match(word) for word in arguments):
        stops(arguments)
    elif name in SUBCOMMANDS:
        if not fits or LARGE.search(line):
            stops([*arguments, "--print_config"])
            return
        short = ["--model.max_completion_length=4"] if ONLINE.search(line) else []
        assert run_cli([*arguments, *QUIET, *short]).trainer.state.finished, line
    else:
        assert name in COMMANDS, line
        if name == "export" and not fits:  # of a run that was not made
            return
        assert run_command(name, arguments[1:]) == 0, line


def stops(arguments):
    """A command that prints and ends."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stopped:
        run_cli(arguments)
    assert not stopped.value.code, arguments
    assert out.getvalue(), arguments
