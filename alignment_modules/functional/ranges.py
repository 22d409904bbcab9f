"""Options say in their type what they may be, and one function checks them, whoever gives them.

A numeric option has one range, in its annotation: `beta: Positive`, `top_p: Annotated[float, Range(0, 1, "(]")]`. NaN
and infinities are in no range, and `True` is no number.
"""

import functools
import inspect
import math
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `greatest`; a round bracket in `ends` leaves that end out.

    >>> [0.5 in Range(0, 0.5), 0.5 in Range(0, 0.5, "[)"), math.inf in Range(0)]
    [True, False, False]
    """

    least: float = -math.inf
    greatest: float = math.inf
    ends: Literal["[]", "[)", "(]", "()"] = "[]"

    def __contains__(self, value: float) -> bool:
        above = value > self.least if self.ends[0] == "(" else value >= self.least
        return (
            above and math.isfinite(value) and (value < self.greatest if ")" in self.ends else value <= self.greatest)
        )

    def __str__(self) -> str:
        if not math.isinf(self.greatest):
            if self.ends == "[]":
                return f" from {self.least:g} to {self.greatest:.10g}"
            return f" in {self.ends[0]}{self.least:g}, {self.greatest:.10g}{self.ends[1]}"
        if math.isinf(self.least):
            return ""
        return f" > {self.least:g}" if self.ends[0] == "(" else f" of {self.least:g} or more"


MAX_INT = 2**31 - 1
Positive = Annotated[float, Range(0, ends="(]")]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Finite = Annotated[float, Range()]
Count = Annotated[int, Range(1, MAX_INT)]
Natural = Annotated[int, Range(0, MAX_INT)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


def check_options(owner: Any, values: Mapping[str, Any], prefix: str = "") -> None:
    """Compare options with their annotations.

    Args:
        owner: The function, constructor or dataclass whose annotations count.
        values: The options by name, such as `locals()` in the first line of `owner`; other names are left alone.
        prefix: What stands before a name in the message, such as "lora.".

    Raises:
        ValueError: If one is none of what its annotation allows, naming it, its value and what is allowed.

    >>> def clip(*, epsilon: Share = 0.2) -> None: ...
    >>> check_options(clip, {"epsilon": math.nan})
    Traceback (most recent call last):
    ...
    ValueError: epsilon=nan must be a finite number from 0 to 1
    """
    for name, hint in _hints(owner).items():
        if name in values and not fits(values[name], hint):
            raise ValueError(f"{prefix}{name}={values[name]!r} must be {describe(hint)}")


def describe(hint: Any) -> str:
    """What an annotation allows, in words.

    >>> describe(Count | None), describe(Literal["loss", "reward"]), describe(list[Positive])
    ('an integer from 1 to 2147483647 or null', "'loss' or 'reward'", 'a list of a finite number > 0')
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe(arguments[0]) + "".join(str(range_) for range_ in arguments[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if Callable in (origin, hint):
        return "a callable"
    if origin is list:
        return f"a list of {describe(arguments[0])}"
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", types.NoneType: "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation allows; classes and callables are left to those who use them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, arguments[0]) and all(value in range_ for range_ in arguments[1:])
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is list:
        return isinstance(value, list | tuple) and all(fits(entry, arguments[0]) for entry in value)
    if Callable in (origin, hint):
        return callable(value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | os.PathLike)
    return hint not in (bool, types.NoneType) or isinstance(value, hint)


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    hints = get_type_hints(owner, include_extras=True)
    parameters = {} if is_dataclass(owner) else inspect.signature(owner).parameters
    return {
        name: hint
        for name, hint in hints.items()
        if name != "return" and (name not in parameters or parameters[name].kind is not inspect.Parameter.VAR_KEYWORD)
    }
