"""`align convert`: reads a configuration file of TRL's command line and writes ours."""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from alignment_modules.cli.converting.table import CLASSES, FIXED, TABLE, Row
from alignment_modules.cli.converting.values import SKIP, UntranslatedError
from alignment_modules.cli.options import OptionParser
from alignment_modules.cli.repeated_keys import refuse_repeated_keys

CLASS_LIKE = ("model", "data", "model.optimizer", "model.lr_scheduler")
"""Options that are a class with its arguments."""


@functools.cache
def trl_options() -> Mapping[str, Any]:
    """Options with defaults: "all" for those of all of TRL's commands, by command its others; and TRL's "version"."""
    found: dict[str, Any] = json.loads(
        resources.files(__package__).joinpath("trl_options.json").read_text(encoding="utf-8")
    )
    return found


def defaults(command: str) -> dict[str, Any]:
    """Every option of one of TRL's commands with its default.

    Args:
        command: A key of `CLASSES`.
    """
    return {**trl_options()["all"], **trl_options()[command]}


def rows(command: str) -> Iterator[Row]:
    """The rows of the table that one of TRL's commands has."""
    known = defaults(command)
    for section in TABLE:
        if command in section.commands:
            yield from (row for row in section.rows if row.name in known)


def convert(command: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translates the options of a TRL command.

    Args:
        command: A key of `CLASSES`: "sft", "dpo", "kto", "reward", "grpo" or "rloo".
        given: What TRL's file gives, by name. What it does not give has TRL's default, which is written, too.

    Returns:
        Our configuration, nested as a file of `align fit --config` is, and what differs in meaning, a line each.

    Raises:
        ValueError: With a line for each option that TRL does not have or that has no counterpart here.
    """
    known = defaults(command)
    wrong = [_unknown(name, command) for name in given if name not in known]
    options = known | {name: _read_value(value, known.get(name)) for name, value in given.items()}
    flat: dict[str, Any] = {}
    differs = []
    for row in rows(command):
        value = options[row.name]
        try:
            found = row.value(_of_kind(value, known[row.name]), options)
        except UntranslatedError as reason:
            wrong.append(f"{row.name}={value!r}: {reason}")
            continue
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            wrong.append(f"{row.name}={value!r}: cannot be read ({error}), or an option that it is read with")
            continue
        ours = row.ours.split()
        parts = found if len(ours) > 1 else [found] * len(ours)  # of a row without counterpart nothing is written
        flat |= {name: one for name, one in zip(ours, parts, strict=True) if one is not SKIP}
        if row.differs and (row.name in given or row.unasked(options)):
            differs.append(f"{row.name}: {row.differs}")
    told = {row.name for row in rows(command)}
    for name, value in options.items():
        if name in known and name not in told and value != known[name] and not name.startswith("vllm_"):
            wrong.append(f"{name}={value!r}: has no counterpart here")
    if wrong:
        raise ValueError("\n  ".join([f"{len(wrong)} of TRL's options cannot be translated:", *wrong]))
    return _nested(command, {**flat, **FIXED.get(command, {})}), differs


def convert_command(arguments: list[str]) -> int:
    """Runs `align convert`.

    Args:
        arguments: What follows `align convert`.

    Returns:
        0.

    Raises:
        ValueError: If a file cannot be read, exists already, or has options that cannot be translated.
    """
    given = _parser().parse_args(arguments)
    config, differs = convert(given.command, _read(given.file))
    head = f"# From a configuration of `trl {given.command}` (TRL {trl_options()['version']})"
    text = f"{head}\n{yaml.safe_dump(config, sort_keys=False)}"
    if given.write is None:
        print(text, end="")
    else:
        _write(Path(given.write), text)
    for line in differs:
        sys.stderr.write(f"differs: {line}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        "convert",
        f"{{{','.join(CLASSES)}}} FILE [--write OURS]",
        "Translate a configuration file of TRL's command line. What it does not give has TRL's default, which is\n"
        "written, too. Options without a counterpart are refused by name; what differs in meaning is told.",
        "align convert dpo trl.yaml --write dpo.yaml",
    )
    parser.add_argument("command", choices=list(CLASSES), help="the command of TRL that the file is for")
    parser.add_argument("file", help="its configuration file")
    parser.add_argument("--write", metavar="OURS", help="write to this file, which must not exist (default: print)")
    return parser


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        refuse_repeated_keys(text, path)
        found = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a YAML file of options such as 'learning_rate: 1.0e-6'")
    return {str(name): value for name, value in found.items()}


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ValueError(f"--write={path}: cannot be written: {error}") from None


def _unknown(name: str, command: str) -> str:
    near = difflib.get_close_matches(name, defaults(command), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name}: `trl {command}` of TRL {trl_options()['version']} has no such option{hint}"


def _read_value(value: Any, default: Any) -> Any:
    """A value as TRL reads it: YAML takes 1e-6 for text, and a bare `no` for false."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value, flags=re.IGNORECASE):
        return float(value)
    return "no" if value is False and isinstance(default, str) and default != "group" else value


def _of_kind(value: Any, default: Any) -> Any:
    """The value; refused where it is no number, or neither true nor false, and TRL's default is one."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UntranslatedError("must be true or false")
    elif isinstance(default, int | float) and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UntranslatedError("must be a number" + " here, too" * (value is None))
    return value


def _nested(command: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of options by their dotted names, with classes as `class_path` and `init_args`."""
    model, data = CLASSES[command]
    tree: dict[str, Any] = {"seed_everything": 0, "trainer": {}}
    for name, value in {"model": model, "data": data, **flat}.items():
        *path, last = name.split(".")
        node, here = tree, ""
        for part in path:
            here = f"{here}.{part}".strip(".")
            node = node.setdefault(part, {})
            node = node.setdefault("init_args", {}) if here in CLASS_LIKE else node
        if name in CLASS_LIKE:
            node[last] = {"class_path": value, **node.get(last, {})}
        else:
            node[last] = value
    return tree
