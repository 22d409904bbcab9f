"""Which options there are: those of `fit` by the signatures behind them, others by the commands' own help."""

import contextlib
import dataclasses
import inspect
import io
import re
import typing
from functools import cache

import lightning as L
from lightning.pytorch import LightningDataModule

import datamodules
from alignment_modules import callbacks
from alignment_modules.cli.commands import COMMANDS, run_command
from alignment_modules.paradigms import PARADIGMS
from tests.docs.pages import ROOT

GROUPS = {
    "exact_resume": callbacks.ExactResume,
    "finite_guard": callbacks.FiniteGuard,
    "throughput": callbacks.Throughput,
    "export": callbacks.ExportPolicy,
    "predictions": callbacks.CompletionWriter,
    "checkpoints": callbacks.Checkpoints,
    "watch": callbacks.LearningWatch,
    "report": callbacks.RunReport,
    "comparison": callbacks.CompareRuns,
}
OF_EVERY_COMMAND = {"--config", "--print_config", "--ckpt_path", "--seed_everything", "--help", "--model", "--data"}
OF_OTHERS = {
    "--logdir",
    "--extra-index-url",
    "--enable-lora",
    "--enable-sleep-mode",
    "--logprobs-mode",
    "--max-lora-rank",
    "--return-sampling-mask",
    "--weight-transfer-config",
}


def keywords(cls):
    """Annotations of what a class's constructor takes, those of its bases included."""
    found = {}
    for base in inspect.getmro(cls):
        if "__init__" in vars(base):
            hints = typing.get_type_hints(base.__init__)
            for name in inspect.signature(base.__init__).parameters:
                found.setdefault(name, hints.get(name))
    return found


def dataclasses_of(annotation):
    """The dataclasses that a value may be."""
    if dataclasses.is_dataclass(annotation):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in dataclasses_of(part)]


def has(classes, path):
    """Whether one of some classes takes the first name of a path, and what that is, the rest, as far as it is known."""
    name, *rest = path
    if name in ("class_path", "init_args", "help", "dict_kwargs"):
        return not rest or has(classes, rest)
    found = [annotations[name] for annotations in map(keywords, classes) if name in annotations]
    if not found or not rest:
        return bool(found)
    inner = [cls for annotation in found for cls in dataclasses_of(annotation)]
    keyed = any(typing.get_origin(annotation) is dict for annotation in found)  # by names of the user's own
    return keyed or not inner or has(inner, rest)


@cache
def told_elsewhere():
    """The help of the commands that need no configuration, and the sources of scripts."""
    texts = []
    for command in COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            run_command(command, ["--help"])
        texts.append(out.getvalue())
    texts += [path.read_text() for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(texts)


def is_option(option):
    """Whether a command of the project, or a script of the repository, takes an option."""
    if option in OF_EVERY_COMMAND | OF_OTHERS:
        return True
    first, *rest = option.removeprefix("--").split(".")
    if first == "trainer":
        return has([L.Trainer], rest) if rest[0] != "callbacks" else True
    if first == "model" and rest:
        return has(PARADIGMS, rest)
    if first == "data" and rest:
        modules = [cls for cls in vars(datamodules).values() if isinstance(cls, type)]
        return has([cls for cls in modules if issubclass(cls, LightningDataModule)], rest)
    if first in GROUPS and rest:
        return has([GROUPS[first]], rest)
    return re.search(rf"{re.escape(option)}(?![\w-])", told_elsewhere()) is not None
