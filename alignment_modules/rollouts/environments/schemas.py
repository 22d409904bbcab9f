"""Tools: what a chat template tells of a function, and whether the arguments of a call are what it takes."""

from __future__ import annotations

import enum
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from alignment_modules.functional.http import short

RESERVED = ("reset", "get_reward", "turn_rewards", "close")
"""Methods of an environment that belong to the loop and are no tools."""

_KINDS: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


class ArgumentError(ValueError):
    """The arguments of a call are not what the tool takes; the message is what the policy reads."""


@dataclass(frozen=True, eq=False)
class Tool:
    """A function that a policy may call.

    Attributes:
        name: What calls name it.
        schema: `{"type": "function", "function": {"name", "description", "parameters", ...}}`, as chat templates read
            it (`transformers.utils.get_json_schema`).
        call: The function; what an `async def` one promises is awaited by those who call it.
        path: Its import path where it was given by one: only then can another process run it.
        owner: The environment that it is a method of, whose calls run one after the other; None: it has no state.
    """

    name: str
    schema: dict[str, Any]
    call: Callable[..., Any]
    path: str | None = None
    owner: Any = None

    def check(self, arguments: Any, *, as_text: bool = False) -> dict[str, Any]:
        """The arguments of a call as the function takes them.

        A number with nothing behind its point is an integer. Nothing else is converted.

        Args:
            arguments: By name.
            as_text: Whether every argument is text, as in formats without types: whatever the schema does not call a
                string is then read as JSON.

        Returns:
            The arguments.

        Raises:
            ArgumentError: If one is missing, unknown, or of another type; it tells what is expected.
        """
        parameters = self.schema["function"]["parameters"]
        known, required = parameters.get("properties", {}), parameters.get("required", [])
        if not isinstance(arguments, Mapping):
            raise ArgumentError(f"the arguments of {self.name} must be an object, not {short(arguments)}; {self.usage}")
        missing = [name for name in required if name not in arguments]
        extra = [name for name in arguments if name not in known]
        if missing or extra:
            told = [f"misses {', '.join(missing)}"] * bool(missing)
            told += [f"takes no {', '.join(map(str, extra))}"] * bool(extra)
            raise ArgumentError(f"{self.name} {' and '.join(told)}; {self.usage}")
        checked = {}
        for name, value in arguments.items():
            fitting, found = _fitted(value, known[name], as_text)
            if not fitting:
                raise ArgumentError(
                    f"{name}={short(value)} of {self.name} must be {_describe(known[name])}; {self.usage}"
                )
            checked[name] = found
        return checked

    @property
    def usage(self) -> str:
        """How it is called, such as `usage: add(a: integer, b: integer, [carry: boolean])`."""
        parameters = self.schema["function"]["parameters"]
        required = parameters.get("required", [])
        shown = [
            f"{name}: {_describe(schema)}" if name in required else f"[{name}: {_describe(schema)}]"
            for name, schema in parameters.get("properties", {}).items()
        ]
        return f"usage: {self.name}({', '.join(shown)})"


def tool_of(function: Callable[..., Any], place: str, *, path: str | None = None, owner: Any = None) -> Tool:
    """A function or bound method as a tool.

    Args:
        function: Documented (with a line for each argument below `Args:`) and typed.
        place: What errors call it, such as `tools[0]=add`.
        path: Its import path, if it was given by one.
        owner: The environment that it is a method of.

    Returns:
        The tool.

    Raises:
        ValueError: If it has no name, documentation or types, or takes arguments that no call can bring.
    """
    from transformers.utils import DocstringParsingException, TypeHintParsingException, get_json_schema

    if not isinstance(getattr(function, "__name__", None), str) or not function.__name__.isidentifier():
        raise ValueError(f"{place} has no name that a call could use: give a function, or a method of an object")
    try:
        parameters = list(inspect.signature(function).parameters.values())
        hints = get_type_hints(function)
    except (TypeError, ValueError, NameError) as error:
        raise ValueError(f"{place}: its signature cannot be read: {error}") from error
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"{place} takes {parameter}: calls give their arguments by name, so name them one by one")
        if parameter.annotation is parameter.empty:
            raise ValueError(f"{place}: argument {parameter.name!r} has no type, which its schema is made from")
        if _has_enum(hints.get(parameter.name)):
            raise ValueError(f"{place}: argument {parameter.name!r} is an Enum; calls bring text: use Literal")
    try:
        schema = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, ValueError) as error:
        raise ValueError(f"{place} cannot be offered as a tool: {_first_line(error)}") from error
    for name, property_ in schema["function"]["parameters"].get("properties", {}).items():
        if unknown := _unknown_kinds(property_):
            raise ValueError(f"{place}: argument {name!r} is of type {unknown[0]!r}, which a call cannot write")
    return Tool(function.__name__, schema, function, path, owner)


def methods_of(thing: Any, place: str, *, owner: Any = None) -> list[Tool]:
    """The public methods of an object as tools, but for those that belong to the loop.

    Args:
        thing: An environment, or an object whose methods have no state.
        place: What errors call it.
        owner: The environment, where it is one.

    Returns:
        The tools, in the order of their definition, those of base classes first.

    Raises:
        ValueError: If a public method lacks documentation or types; it names the method.
    """
    names: dict[str, None] = {}
    for level in reversed(type(thing).__mro__[:-1]):
        for name, value in vars(level).items():
            if isinstance(value, staticmethod | classmethod) or inspect.isfunction(value):
                names[name] = None
    public = [name for name in names if not name.startswith("_") and name not in RESERVED]
    return [tool_of(method, f"{place}.{n}", owner=owner) for n in public if callable(method := getattr(thing, n))]


def _fitted(value: Any, schema: Mapping[str, Any], as_text: bool) -> tuple[bool, Any]:
    """Whether a value is of a schema, and the value as the function takes it."""
    if as_text and isinstance(value, str):
        return _read(value, schema)
    if value is None and schema.get("nullable"):
        return True, None
    if "enum" in schema and not any(type(value) is type(one) and value == one for one in schema["enum"]):
        return False, value
    if "anyOf" in schema:
        found = [fitted for one in schema["anyOf"] if (fitted := _fitted(value, one, False))[0]]
        return found[0] if found else (False, value)
    if "type" not in schema:
        return True, value
    kinds = _types(schema)
    if isinstance(value, float) and value.is_integer() and "integer" in kinds and "number" not in kinds:
        return True, int(value)
    if isinstance(value, bool) and "boolean" not in kinds:  # True is an int of Python's, and no number here
        return False, value
    if not isinstance(value, tuple(kind for name in kinds for kind in _KINDS[name])):
        return False, value
    return _fitted_parts(value, schema)


def _fitted_parts(value: Any, schema: Mapping[str, Any]) -> tuple[bool, Any]:
    """The same for what a list or an object holds."""
    if isinstance(value, list) and ("items" in schema or "prefixItems" in schema):
        schemas = schema.get("prefixItems") or [schema["items"]] * len(value)
        parts = [_fitted(one, inner, False) for one, inner in zip(value, schemas, strict=False)]
        return len(schemas) == len(value) and all(fits for fits, _ in parts), [part for _, part in parts]
    if isinstance(value, dict) and isinstance(inner := schema.get("additionalProperties"), dict):
        found = {name: _fitted(one, inner, False) for name, one in value.items()}
        return all(fits for fits, _ in found.values()), {name: part for name, (_, part) in found.items()}
    return True, value


def _read(text: str, schema: Mapping[str, Any]) -> tuple[bool, Any]:
    """A text as what a schema makes of it: JSON where that fits, else the text itself."""
    if _types(schema) != ("string",) or schema.get("nullable"):
        try:
            value = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            value = None if text in ("None", "null") else {"True": True, "False": False}.get(text, text)
        fits, found = _fitted(value, schema, False)
        if fits and not isinstance(value, str):
            return True, found
    return _fitted(text, schema, False)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _types(schema: Mapping[str, Any]) -> tuple[str, ...]:
    kinds = schema.get("type", ())
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def _describe(schema: Mapping[str, Any]) -> str:
    """A schema in words."""
    if "enum" in schema:
        words = " or ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    elif "anyOf" in schema:
        words = " or ".join(map(_describe, schema["anyOf"]))
    elif "prefixItems" in schema:
        words = f"array of {len(schema['prefixItems'])} ({', '.join(map(_describe, schema['prefixItems']))})"
    elif "items" in schema:
        words = f"array of {_describe(schema['items'])}"
    else:
        words = " or ".join(_types(schema)) or "any value"
    return f"{words} or null" if schema.get("nullable") else words


def _unknown_kinds(schema: Mapping[str, Any]) -> list[str]:
    inner = [*schema.get("anyOf", []), *schema.get("prefixItems", [])]
    inner += [schema[key] for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)]
    own = [kind for kind in _types(schema) if kind not in _KINDS]
    return own + [kind for one in inner for kind in _unknown_kinds(one)]


def _has_enum(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, enum.Enum)) or any(map(_has_enum, get_args(hint)))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
