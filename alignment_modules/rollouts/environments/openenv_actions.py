"""The action of an OpenEnv environment as a typed and documented function, which is what tools are made from."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

_TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "object": dict,
    "null": None,
}
_OF_THE_PROTOCOL = ("metadata",)
"""Fields that every action has and no policy writes."""


def action_tool(schema: Mapping[str, Any], call: Callable[..., Any], *, name: str, description: str) -> Any:
    """A function with one argument for each field of an action.

    Args:
        schema: JSON schema of the action, as pydantic writes it.
        call: What it does: gets the environment, and the fields by name.
        name: Its name.
        description: What it does, in words; empty: what the schema says.

    Returns:
        A method.

    Raises:
        ValueError: The schema is none of an object, or a field has a name that no argument can have.
    """
    fields, defs = schema.get("properties"), schema.get("$defs", {})
    if not isinstance(fields, Mapping):
        raise ValueError(f"the action's schema has no properties: {str(schema)[:200]}")
    fields = {name: field for name, field in fields.items() if name not in _OF_THE_PROTOCOL}
    required, lines, parameters = schema.get("required", []), [], []
    for field, given in fields.items():
        if not field.isidentifier() or field == "self":
            raise ValueError(f"the action's field {field!r} has a name that no argument can have")
        default = inspect.Parameter.empty if field in required else given.get("default")
        hint = _hint(given, defs)
        parameters.append(inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
        lines.append(f"    {field}: {_one_line(given.get('description')) or _one_line(given.get('title')) or field}")

    def method(self: Any, **given: Any) -> str:
        return call(self, given)

    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters.sort(key=lambda one: one.default is not one.empty)
    method.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    method.__annotations__ = {one.name: one.annotation for one in parameters}
    said = _one_line(description) or _one_line(schema.get("description")) or "Takes an action."
    method.__doc__ = "\n".join([said, *(["", "Args:", *lines] if lines else [])])
    method.__name__ = method.__qualname__ = name
    return method


def _hint(field: Any, defs: Mapping[str, Any]) -> Any:
    """The type of a field; `Any` where its schema says nothing that a type can say."""
    if not isinstance(field, Mapping):
        return Any
    if "$ref" in field:
        return _hint(defs.get(str(field["$ref"]).rpartition("/")[2]), {})
    choices = field.get("enum", [field["const"]] if "const" in field else None)
    if choices:
        return Literal[tuple(choices)]
    if alternatives := field.get("anyOf") or field.get("oneOf"):
        hints = [_hint(one, defs) for one in alternatives]
        return Any if Any in hints else functools.reduce(operator.or_, hints)
    if field.get("type") == "array":
        return list[_hint(field.get("items"), defs)]  # type: ignore[misc]
    return _TYPES.get(str(field.get("type")), Any)


def _one_line(text: Any) -> str:
    """Lines of its own would be read as more arguments."""
    return " ".join(str(text or "").split()).replace(":", " -")
