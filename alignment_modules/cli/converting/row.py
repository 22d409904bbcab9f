"""What the table of options is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from alignment_modules.cli.converting.values import SKIP, Given, Value, refused, unless


def never(given: Given) -> bool:
    """False."""
    return False


class Row(NamedTuple):
    """An option of TRL."""

    name: str
    ours: str
    """Ours, by dotted names with a space between two; empty: none."""
    value: Value
    """What its value becomes: one, or one for each of ours."""
    differs: str = ""
    """What differs in meaning, which is told where the option is given."""
    note: str = ""
    """What else a reader of the table should know, such as another default."""
    unasked: Callable[[Given], bool] = never
    """Of all options, whether that is told where the option is not given, too."""


@dataclass(frozen=True)
class Section:
    """Rows that some of TRL's commands have; of these each row counts for those that know its option."""

    title: str
    commands: tuple[str, ...]
    rows: tuple[Row, ...]


def nothing(value: Any, given: Mapping[str, Any]) -> Any:
    """Nothing: the option changes no result, or what it asks for is always so."""
    return SKIP


def refusal(name: str, default: Any, hint: str) -> Row:
    """The row of an option that is refused where it is not TRL's default, with what to do instead."""
    return Row(name, "", unless(default, refused(hint)), note=f"refused: {hint}")
