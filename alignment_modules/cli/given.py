"""What the arguments of a command and its configuration files give, as one tree of options."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import get_loader

from alignment_modules.cli.classes import CLASSES_ONLY, choices, option_names, path_of

STRAY = ""
"""The key of words that belong to no option."""


class Text(str):
    """A value as it was typed."""

    def read(self) -> Any:
        """What YAML reads in it; the text itself where that is not possible."""
        try:
            return get_loader("yaml")(str(self))
        except Exception:  # told by the parser
            return str(self)


def given_options(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Merges the files and options of a command, the later over the earlier.

    Args:
        arguments: The command's arguments after `align`, with or without the subcommand.
        folder: Where the command began; the parser reads a file in the file's own folder.

    Returns:
        A tree whose leaves are values of files, and `Text` for what was typed. A class is a dictionary with
        `class_path` and `init_args`.
    """
    tree: dict[str, Any] = {}
    for option, value in _pairs(arguments):
        if option in ("-c", "--config"):
            with contextlib.suppress(Exception):  # told by the parser
                _merge(tree, get_loader("yaml")((folder / Path(value).expanduser()).read_text(encoding="utf-8")))
        else:
            _put(tree, option.lstrip("-").split("."), Text(value))
    return tree


def configs(arguments: Sequence[str]) -> list[str]:
    """The configuration files of a command, as they were typed."""
    return [value for option, value in _pairs(arguments) if option in ("-c", "--config")]


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    waiting = ""
    for number, argument in enumerate(arguments):
        if waiting:
            yield waiting, argument
            waiting = ""
        elif argument.startswith("-") and "=" in argument:
            option, _, value = argument.partition("=")
            yield option, value
        elif argument.startswith("-"):
            waiting = argument
        elif number:  # the first is the subcommand
            yield STRAY, argument
    if waiting:
        yield waiting, ""


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    key, *rest = keys
    appended = key.endswith("+")
    key = key.rstrip("+")
    if appended:
        there = tree.get(key)
        tree[key] = [*(there if isinstance(there, list) else [there] if there else []), value]
    elif not rest:
        _merge(tree, {key: value})
    else:
        there = tree.get(key)
        inside = _as_class(key, there[-1] if isinstance(there, list) and there else there)
        if isinstance(there, list) and there:
            there[-1] = inside
        else:
            tree[key] = inside
        plain = rest[0] in ("class_path", "init_args") or ("class_path" not in inside and "init_args" not in inside)
        _put(inside if plain else inside.setdefault("init_args", {}), rest, value)


def _as_class(key: str, node: Any) -> dict[str, Any]:
    """The options that follow belong to the class that was named before, if it was one and not a folder."""
    read = node.read() if isinstance(node, Text) else node
    classes = (*choices(key), *choices("data"))  # a mixture's sources have names of the user's
    known = {name for c in classes for name in (c.__name__, path_of(c))}
    dotted = isinstance(read, str) and "." in read and all(map(str.isidentifier, read.split(".")))
    if isinstance(read, str) and (dotted or key in CLASSES_ONLY or read in known):
        return {"class_path": read, "init_args": {}}
    return read if isinstance(read, dict) else {}


def _merge(tree: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        there = tree.get(key)
        if isinstance(there, dict) and isinstance(value, dict):
            if isinstance(value.get("class_path"), str):
                _rename(key, there, value["class_path"])
            _merge(there, value)
        elif isinstance(there, dict) and isinstance(value, str) and ("class_path" in there or "init_args" in there):
            _rename(key, there, value)
        else:
            tree[key] = value


def _rename(key: str, node: dict[str, Any], path: str) -> None:
    """Names another class, to which the options stay that it has."""
    before, cls = (_class_of(key, name) for name in (node.get("class_path"), path))
    if None not in (before, cls) and before is not cls and isinstance(node.get("init_args"), dict):
        names = {*option_names(cls)}
        node["init_args"] = {name: value for name, value in node["init_args"].items() if name in names}
    node["class_path"] = path


def _class_of(key: str, path: Any) -> type | None:
    return next((c for c in choices(key) if path in (c.__name__, path_of(c))), None)
