"""Help that a person reads: what there is in a line each, and a class's options with their range and meaning."""

import importlib.metadata
import inspect
import platform
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, get_args

from jsonargparse import ArgumentParser

import alignment_modules
from alignment_modules.cli.classes import OURS, choices, import_path, last, options_of, path_of, takes_classes
from alignment_modules.cli.recipes import about, recipes
from alignment_modules.functional import (
    LOSS_REDUCTIONS,
    PREFERENCE_LOSSES,
    REFERENCE_FREE_LOSSES,
    Divergence,
    UnpairedLoss,
)
from alignment_modules.functional.ranges import MAX_INT, describe
from alignment_modules.paradigms import PARADIGMS
from alignment_modules.paradigms.online_dpo import OnlineLoss
from alignment_modules.training.presets import PRESETS, Settings

_WIDTH = 120
_INDENT = 26
_KINDS = {"modules": "model", "data": "data", "tasks": "data.train", "schedules": "lr_scheduler"}
_KINDS |= {name: name for name in ("rewards", "callbacks")}
_LISTS = ("recipes", "losses", "presets")
_COMMANDS = {
    "fit": "train; writes below trainer.default_root_dir",
    "validate": "the objective on data.validation",
    "test": "exact match and pass@k on data.test",
    "predict": "completions of data.predict as JSONL",
    "inspect": "what a model will see, before training: rows, lengths, steps, memory",
    "chat": "talk with a policy: align chat --policy runs/sft/export",
    "generate": "complete prompts, or make data of them: align generate --policy runs/sft/export '1+1='",
    "export": "a run's checkpoint as a folder in Hugging Face format: align export runs/sft OUT",
    "convert": "a configuration of TRL as one of ours: align convert dpo trl.yaml --write dpo.yaml",
    "cache": "tokenised tables on disk, and their removal: align cache --clear 30",
    "list": f"what there is: align list {' | '.join([*_KINDS, *_LISTS])}",
}


def help_for(parser: ArgumentParser, given: Sequence[str]) -> str | None:
    """The help that the arguments ask for; None where they ask for none, or for one that jsonargparse has.

    Args:
        parser: The parser of the whole command.
        given: The command's arguments.

    Raises:
        ValueError: If help on a class is asked for that is not there.
    """
    if given[:1] == ["--version"]:
        return _versions()
    if given[:1] == ["list"]:
        if given[1:2] in (["-h"], ["--help"]):
            return f"usage: align list KIND\n\n{_COMMANDS['list']}"
        return _listing(given[1] if len(given) > 1 else "")
    subparsers = getattr(parser, "_subcommands_action", None)
    for number, argument in enumerate(given):
        option, _, name = argument.partition("=")
        if argument in ("-h", "--help"):
            command = next((word for word in given[:number] if subparsers and word in subparsers.choices), None)
            return options_help(subparsers.choices[command]) if subparsers and command else _overview()
        option = option.removeprefix("--").removesuffix(".help")
        if re.match(r"--[\w.]+\.help(=|$)", argument) and choices(option):
            name = name or next((word for word in given[number + 1 : number + 2] if not word.startswith("-")), "")
            found = choices(option)
            if not name and len(found) > 1:
                return class_list(found, option)
            return class_help(_find(name or found[0].__name__, found, option), option)
    return None


def _versions() -> str:
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightning", "transformers")]
    return f"align {alignment_modules.__version__} ({', '.join(libraries)}, Python {platform.python_version()})"


def _overview() -> str:
    modules = {c.paradigm: c for c in PARADIGMS}
    paradigms = "\n".join(
        _entry(name, _cut(f"{c.__name__}: {_summary(c)}", _WIDTH - _INDENT)) for name, c in modules.items()
    )
    names = ", ".join(name for name in recipes() if "/" not in name)
    commands = "\n".join(_entry(name, text) for name, text in _COMMANDS.items())
    return f"""usage: align COMMAND --config NAME_OR_FILE [--config NAME_OR_FILE ...] [--OPTION VALUE ...]

Post-training of language models.

Paradigms (model.class_path)
{paradigms}

Recipes (--config NAME; more of them, and what each is: align list recipes)
  {names}

Commands
{commands}

To begin with
  align fit --config sft --model.policy.path MODEL --data.train data.jsonl
  align fit --config sft ... --print_config       # what would run
  align fit --model.help GRPOModule               # the options of a class

More: align fit --help; align --version"""


def options_help(parser: ArgumentParser) -> str:
    """The options of a subcommand in a line each, those of classes by where to find them."""
    lines = [
        f"usage: {parser.prog.replace(' [options]', '')} --config NAME_OR_FILE [--OPTION VALUE ...]",
        "",
        "The model, the data and what belongs to them (as in a file: `model: {class_path: ..., init_args: ...}`)",
    ]
    for option, what in (
        ("model", "the paradigm's module"),
        ("model.policy", "what is trained: a folder, a hub id or its own options"),
        ("model.optimizer", "such as --model.optimizer AdamW --model.optimizer.lr 1e-5"),
        ("model.lr_scheduler", "the learning rate's course"),
        ("model.rewards", "of GRPOModule: how completions are judged"),
        ("model.evaluation", "how `test` and `predict` generate"),
        ("data", "the data module"),
        ("trainer.callbacks", "more callbacks: --trainer.callbacks+=SampleTable"),
    ):
        lines.append(_entry(f"--{option}", f"{what}; what there is: --{option}.help"))
    groups: dict[str, list[str]] = {}
    for action in parser._actions:
        group, _, name = action.dest.partition(".")
        text = " ".join(str(action.help or "").split())
        if not action.option_strings or group in ("help", "model", "data") or "help" in last(action.dest):
            continue
        if text == "Path to a configuration file.":
            continue
        text = re.split(r"(?<=\w)\. |\(type:|``?Default", text)[0].rstrip(". ")
        default = "" if action.default in (None, "==SUPPRESS==") else f" (default {_shown(action.default)})"
        groups.setdefault(group if name else "", []).append(_entry(f"--{action.dest}", _cut(text, 64) + default, 36))
    for group, entries in groups.items():
        title = {"": "The command", "trainer": "Lightning's Trainer"}.get(group, f"The callback {group!r} of every run")
        lines += ["", title, *entries]
    return "\n".join(lines)


def class_list(classes: Sequence[type], option: str) -> str:
    """Classes in a line each: this project's described, the others by name."""
    ours = [c for c in classes if _is_ours(c)]
    others = sorted(c.__name__ for c in classes if c not in ours)
    lines = [f"--{option} takes"] + [_entry(c.__name__, _summary(c)) for c in ours]
    if others:
        names = ", ".join(dict.fromkeys(others))
        lines += [*(["and of torch, Lightning and others"] if ours else []), *_wrap(names, 2)]
    return "\n".join([*lines, "", f"Options of one: align fit --{option}.help {classes[0].__name__}"])


def class_help(cls: type, option: str) -> str:
    """The options of a class with their defaults, ranges and meanings."""
    about = inspect.getdoc(cls) or ""
    about = " ".join(re.split(r"\n\s*\n", about)[0].split())
    lines = [f"{path_of(cls)}", *_wrap(about, 0), "", f"Options: --{option}.NAME VALUE, or `NAME: VALUE` in a file"]
    for level, parameter, hint, words in options_of(cls):
        heading = f"  Of {level.__name__}"
        if level is not cls and heading not in lines and not level.__name__.startswith("_"):
            lines.append(heading)
        kind = _kind(hint)
        default = "required" if parameter.default is parameter.empty else f"default {_shown(parameter.default)}"
        default = "" if default == "default <factory>" else default
        classes = takes_classes(parameter.name, hint)
        own = f" Its options: --{option}.{parameter.name}.help" if classes else ""
        words = words if _is_ours(level) else _cut(re.sub(r" \(default: .*?\)+", "", words), 160)
        told = ", ".join(filter(None, (kind, default)))
        lines.append(_entry(parameter.name, f"{words}{own}{f' [{told}]' if told else ''}"))
    return "\n".join(lines)


def _listing(kind: str) -> str:
    if kind == "losses":
        found = {
            "PretrainModule, SFTModule": ("nll", "dft"),
            "DPOModule": PREFERENCE_LOSSES,
            "CPOModule": REFERENCE_FREE_LOSSES,
            "KTOModule": get_args(UnpairedLoss),
            "DistillationModule": get_args(Divergence),
            "OnlineDPOModule": get_args(OnlineLoss),
            "GRPOModule": LOSS_REDUCTIONS,
        }
        return "\n".join(f"{name}: {', '.join(losses)}" for name, losses in found.items())
    if kind == "presets":
        return "\n".join(_entry(name, Settings(name, {}).describe().partition(" ")[2]) for name in PRESETS)
    if kind == "recipes":
        return "\n".join(_entry(name, _cut(about(path), _WIDTH - _INDENT)) for name, path in recipes().items())
    if kind not in _KINDS:
        raise ValueError(f"{f'align list {kind}'.rstrip()}: must be one of {', '.join([*_KINDS, *_LISTS])}")
    option = _KINDS[kind]
    option = f"model.{option}" if option in ("rewards", "lr_scheduler") else option
    return class_list(choices(option), f"trainer.{option}" if option == "callbacks" else option)


def _find(name: str, classes: Sequence[type], option: str) -> type:
    found = next((c for c in classes if name in (c.__name__, path_of(c))), None)
    if found is None and "." in name:
        try:
            found = import_path(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--{option}.help {name}: {error}") from error
    if not inspect.isclass(found):
        ours = [c.__name__ for c in classes if _is_ours(c)] or [c.__name__ for c in classes]
        raise ValueError(f"--{option}.help {name}: there is no such class\n  allowed: {', '.join(ours)}")
    return found


def _kind(hint: Any) -> str:
    """A type in few words; none for objects, which the description explains."""
    if not any(word in str(hint) for word in ("Range(", "Literal", "bool")):
        return ""
    text = describe(hint).replace("a finite number", "number").replace("an integer", "integer")
    return re.sub(rf"from (-?\d+) to ({MAX_INT}|4294967295)", r"of \1 or more", text)


def _shown(value: Any) -> str:
    if inspect.isclass(value):
        return value.__name__
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else _cut(str(value), 40)


def _summary(cls: type) -> str:
    return _cut((inspect.getdoc(cls) or "").split("\n")[0], _WIDTH - _INDENT)


def _entry(name: str, text: str, indent: int = _INDENT) -> str:
    """A name and what is said about it, wrapped beside it."""
    lead = f"  {name:<{indent - 3}} "
    first, *rest = textwrap.wrap(lead + text, _WIDTH, subsequent_indent=" " * indent, drop_whitespace=True)
    return "\n".join([first, *rest])


def _wrap(text: str, indent: int) -> list[str]:
    return [" " * indent + line for line in textwrap.wrap(text, _WIDTH - indent)]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in OURS


def print_help(parser: ArgumentParser, given: Sequence[str]) -> None:
    """Prints the help that the arguments ask for and exits with 0; returns where they ask for none."""
    text = help_for(parser, given)
    if text is not None:
        print(text)
        sys.exit(0)
