"""The configurations that come with this package, and how `--config` finds them by name."""

from collections.abc import Sequence
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
    if value not in known and not (value and path.exists()):  # of a folder the parser tells
        plain = PurePosixPath(value.replace("\\", "/")).with_suffix("").as_posix() if value else ""
        same = [name for name in known if name.rpartition("/")[2] == plain.rpartition("/")[2]]
        hint = f"; did you mean {' or '.join(map(repr, same))}?" if same else close(plain, known)
        raise ValueError(
            f"--config={value}: there is no such file, and no recipe of this name{hint}{allowed(known)}\n"
            "  what each is: align list recipes"
        )
    return str(known.get(value, value))


def find_configs(arguments: Sequence[str], folder: Path) -> list[str]:
    """The arguments of a command, with paths in place of names, and before a file those that its key `config` names.

    Args:
        arguments: As they were typed.
        folder: Where relative paths start; in a file its own folder.

    Returns:
        Arguments of which the later count over the earlier, as `--config=PATH`.

    Raises:
        ValueError: As `find_config`; or a file names no text, or itself.
    """
    found: list[str] = []
    waiting = False
    for argument in arguments:
        option, sign, value = argument.partition("=")
        named = option in ("-c", "--config")
        if waiting or (named and sign):
            found.extend(f"--config={path}" for path in _stack(argument if waiting else value, folder, ()))
        elif not named:
            found.append(argument)
        waiting = named and not sign and not waiting
    return [*found, "--config"] if waiting else found


def without_config(text: str) -> str:
    """The text of a configuration without the key `config`, which `find_configs` has followed."""
    options = _read(text)
    if "config" not in options:
        return text
    return yaml.safe_dump({key: value for key, value in options.items() if key != "config"}, sort_keys=False)


def _stack(value: str, folder: Path, above: tuple[Path, ...]) -> list[str]:
    """A configuration after those that it names."""
    value = find_config(value, folder)
    path = folder / Path(value).expanduser()
    if path in above:
        raise ValueError(f"--config={value}: names itself: {' -> '.join(map(str, (*above, path)))}")
    try:
        named = _read(path.read_text(encoding="utf-8")).get("config", [])
    except (OSError, UnicodeDecodeError):  # told by the parser, or it is no file
        return [value]
    stacked = []
    for base in named if isinstance(named, list) else [named]:
        if not isinstance(base, str):
            raise ValueError(f"{path}: config={base}: must be the name or path of a configuration, or a list of them")
        try:
            stacked += _stack(base, path.parent, (*above, path))
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix('--')}" if not above else str(error)) from None
    return [*stacked, value if not above else str(path)]


def _read(text: str) -> dict[str, Any]:
    """The options of a file; none where it has no key `config` or is none of YAML, which the parser tells."""
    try:
        options = yaml.safe_load(text) if "config" in text else {}
    except yaml.YAMLError:
        return {}
    return options if isinstance(options, dict) else {}


def _is_text(value: str) -> bool:
    """Whether a value is no YAML of options."""
    try:
        return isinstance(get_loader("yaml")(value), str | None)
    except yaml.YAMLError:  # told by the parser
        return False
