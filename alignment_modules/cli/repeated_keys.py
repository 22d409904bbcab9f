"""Keys that a configuration gives twice, of which YAML would keep the last without a word."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"


class RepeatedKeyError(ValueError):
    """A text gives a key twice."""


def refuse_repeated_keys(text: str, source: str) -> None:
    """Refuses a text of YAML or JSON in which a mapping has a key twice.

    Args:
        text: A configuration file, or a value from the command line; what is no YAML is left to the parser.
        source: Where it is from, for the message.

    Raises:
        RepeatedKeyError: If there is one; it names the key with all that it is below, and the lines.

    Examples:
        >>> refuse_repeated_keys("{beta: 0.1, loss: ipo, beta: 0.2}", "run.yaml")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        alignment_modules.cli.repeated_keys.RepeatedKeyError: run.yaml: beta is given twice, in line 1; only ...
    """
    if text.count(":") < 2:  # most values that are typed
        return
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return
    for path, first, last in _repeated(root, (), set()):
        where = f"in lines {first} and {last}" if first != last else f"in line {first}"
        raise RepeatedKeyError(f"{source}: {'.'.join(path)} is given twice, {where}; only the last would count")


def refuse_in_options(tree: Any, folders: Sequence[Path], option: str = "") -> None:
    """The same for all values of a command, and for the files of YAML that they name.

    Args:
        tree: As `given_options` returns it.
        folders: Where such a file may lie.
        option: The dotted name of the option whose value the tree is.

    Raises:
        RepeatedKeyError: As above; it names the option with its value.
    """
    if isinstance(tree, dict):
        for key, branch in tree.items():
            refuse_in_options(branch, folders, option if key == "init_args" else f"{option}.{key}".lstrip("."))
    elif isinstance(tree, list):
        for branch in tree:
            refuse_in_options(branch, folders, option)
    elif isinstance(tree, str):
        refuse_repeated_keys(str(tree), f"--{option}={tree}")
        if tree.endswith((".yaml", ".yml")):
            for folder in folders:
                with contextlib.suppress(OSError, UnicodeDecodeError):  # none, or told by the parser
                    refuse_repeated_keys((folder / tree).read_text(encoding="utf-8"), f"--{option}={tree}")


def _repeated(
    node: yaml.Node | None, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Path, line of the first and of the next for every repeated key below a node, but for nodes that were seen."""
    if id(node) in seen:  # an alias, which may stand in what it names
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            yield from _repeated(entry, (*path, str(number)), seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        line, name = key.start_mark.line + 1, str(key.value)
        if key.tag != _MERGE and isinstance(key, yaml.ScalarNode):  # what is merged gives way to the mapping's own keys
            if (key.tag, name) in lines:
                yield (*path, name), lines[key.tag, name], line
            lines[key.tag, name] = line
        yield from _repeated(value, (*path, name), seen)
