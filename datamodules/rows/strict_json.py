"""JSON read strictly: a key given twice, NaN, or a number or nesting without bound is an error with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def strict_json(text: str) -> Any:
    """Parses JSON in which no object names a key twice and no number is NaN or infinite.

    Raises:
        json.JSONDecodeError: The text is no JSON.
        ValueError: A key stands twice, a number is no JSON number or has too many digits, or the nesting is too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def find_line(text: str, path: Path) -> str:
    """`path:line` of the first element of a JSON list that `strict_json` refuses, else `path`."""
    decoder = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_refuse)
    position = len(text) - len(text.lstrip()) + 1
    while text.lstrip().startswith("["):
        position += len(text[position:]) - len(text[position:].lstrip(" \t\r\n,"))
        try:
            _, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            break
        except (ValueError, RecursionError):
            return f"{path}:{text.count(chr(10), 0, position) + 1}"
    return str(path)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON value; write null or a number")
