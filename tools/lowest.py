"""Prints the lowest release of each dependency that `pyproject.toml` allows, as constraints for pip."""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
LOWEST = re.compile(r"(?P<name>[\w.-]+)(?:\[[\w,]*\])?>=(?P<release>[\w.]+)")


def lowest(requirements: list[str]) -> list[str]:
    """Constraints `name==release`, a requirement each.

    Raises:
        ValueError: If a requirement has no lowest release.

    Example:
        >>> lowest(["jsonargparse[signatures]>=4.47,<5"])
        ['jsonargparse==4.47']
    """
    found = [(text, LOWEST.match(text)) for text in requirements]
    for text, match in found:
        if match is None:
            raise ValueError(f"{PROJECT.name}: {text!r} names no lowest release (name>=release)")
    return [f"{match['name']}=={match['release']}" for _, match in found if match]


if __name__ == "__main__":
    print(*lowest(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]), sep="\n")
