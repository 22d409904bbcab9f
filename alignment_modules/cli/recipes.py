"""The configurations that come with this package, and how `--config` finds them by name."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from jsonargparse import get_loader

import alignment_modules
from alignment_modules.cli.mistakes import allowed, close

_PLAIN = ("recipes", "strategies")
"""Folders whose configurations go by their own names; those of other folders by `folder/name`."""


def recipes() -> dict[str, Path]:
    """The shipped configurations by the names that `--config` takes, recipes and strategies first.

    They lie inside the installed package, and in a checkout of the repository beside it.

    Examples:
        >>> recipes()["quickstart/sft"].name, recipes()["lora"].parent.name
        ('sft.yaml', 'strategies')
    """
    package = Path(alignment_modules.__file__).parent
    root = next((folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()), package)
    found = {folder: sorted(root.glob(f"{folder}/*.yaml")) for folder in _PLAIN}
    others = sorted(path for path in root.glob("*/*.yaml") if path.parent.name not in _PLAIN)
    plain = {path.stem: path for paths in found.values() for path in paths}
    return plain | {f"{path.parent.name}/{path.stem}": path for path in others}


def about(path: Path) -> str:
    """The first sentence of a configuration's leading comment."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip("# ") or not line.startswith("#"):
            break
        lines.append(line.strip("# "))
    return " ".join(lines).partition(". ")[0].rstrip(".:")


def find_config(value: str, folder: Path) -> str:
    """What `--config VALUE` means: a file, wherever there is one of this name, or else a shipped configuration.

    Args:
        value: A path, a name as `recipes` has it, or YAML itself.
        folder: Where a relative path starts.

    Returns:
        The path of the shipped configuration where its name was given; else `value`.

    Raises:
        ValueError: If there is neither a file nor a shipped configuration of this name.
    """
    path, known = folder / Path(value).expanduser(), recipes()
    if "://" in value or not _is_text(value) or path.is_file():
        return value
    if value not in known and not path.exists():  # of a folder the parser tells
        plain = PurePosixPath(value.replace("\\", "/")).with_suffix("").as_posix() if value else ""
        same = [name for name in known if name.rpartition("/")[2] == plain.rpartition("/")[2]]
        hint = f"; did you mean {' or '.join(map(repr, same))}?" if same else close(plain, known)
        raise ValueError(
            f"--config={value}: there is no such file, and no recipe of this name{hint}{allowed(known)}\n"
            "  what each is: align list recipes"
        )
    return str(known.get(value, value))


def find_configs(arguments: Sequence[str], folder: Path) -> list[str]:
    """The arguments of a command, with the paths of configurations in place of their names.

    Args:
        arguments: As they were typed.
        folder: Where relative paths start.

    Raises:
        ValueError: As `find_config`.
    """
    found: list[str] = []
    for argument in arguments:
        option, sign, value = argument.partition("=")
        if found and found[-1] in ("-c", "--config"):
            found.append(find_config(argument, folder))
        elif sign and option in ("-c", "--config"):
            found.append(f"{option}={find_config(value, folder)}")
        else:
            found.append(argument)
    return found


def find_in_text(text: str, folder: Path) -> str:
    """The same for the text of a configuration that names another one by its key `config`.

    Args:
        text: YAML.
        folder: Where relative paths start, that of the file.

    Raises:
        ValueError: As `find_config`.
    """
    if "config" not in text:
        return text
    for node in _named(text):
        start, end = node.start_mark.index, node.end_mark.index
        text = f"{text[:start]}{json.dumps(find_config(node.value, folder))}{text[end:]}"
    return text


def _named(text: str) -> Iterator[yaml.ScalarNode]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # told by the parser
        return
    pairs: list[tuple[Any, Any]] = root.value if isinstance(root, yaml.MappingNode) else []
    for key, value in pairs:
        if key.value == "config" and isinstance(value, yaml.ScalarNode):
            yield value


def _is_text(value: str) -> bool:
    """Whether a value is no YAML of options."""
    try:
        return isinstance(get_loader("yaml")(value), str | None)
    except yaml.YAMLError:  # told by the parser
        return False
