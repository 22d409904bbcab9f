"""How a policy writes calls of tools: formats by name, those of a user, and which one a chat template writes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignment_modules.functional.http import short
from alignment_modules.functional.import_path import import_object, is_import_path
from alignment_modules.rollouts.environments.parsing import (
    Call,
    JsonTags,
    Llama,
    Malformed,
    Parsed,
    QwenXml,
    ToolFormat,
    call_of,
)

__all__ = ["FORMATS", "Call", "FunctionFormat", "Parsed", "ToolFormat", "detect", "tool_format"]

FORMATS: dict[str, ToolFormat] = {"json_tags": JsonTags(), "llama": Llama(), "qwen_xml": QwenXml()}
"""The built-in formats by name."""

_QUESTION, _NAME, _ARGUMENTS = "probe question", "probe_tool", {"probe_key": "probe value"}
_PROBE_SCHEMA = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "A text."}},
            "required": ["probe_key"],
        },
    },
}


class FunctionFormat:
    """A user's function as a format.

    Args:
        function: From a turn's text to its calls: a list of `{"name": ..., "arguments": {...}}`, or a `Parsed`. A
            `ValueError` of it means that the text holds a call that cannot be read, and its message is what the policy
            is told.
        stop_strings: Strings that end a turn beside the template's own end.

    Examples:
        >>> def parse(text):
        ...     name, _, number = text.partition(" ")
        ...     return [{"name": name, "arguments": {"number": int(number)}}] if number else []
        >>> FunctionFormat(parse).parse("double 4").calls
        [Call(name='double', arguments={'number': 4}, as_text=False)]
        >>> FunctionFormat(parse).parse("double four").errors
        ["invalid literal for int() with base 10: 'four'"]
    """

    def __init__(self, function: Callable[[str], Any], stop_strings: Sequence[str] = ()) -> None:
        self.function = function
        self.stop_strings = tuple(stop_strings)

    def parse(self, text: str) -> Parsed:
        """The calls of a turn.

        Raises:
            TypeError: If the function returned something else than calls.
        """
        try:
            found = self.function(text)
        except ValueError as error:
            return Parsed([], [str(error)], text)
        if isinstance(found, Parsed):
            return found
        name = getattr(self.function, "__name__", "tool_options.format")
        if not isinstance(found, list):
            raise TypeError(f"{name} returned {short(found)}: it must return a list of calls, or a Parsed")
        try:
            calls = [one if isinstance(one, Call) else call_of(one, "arguments") for one in found]
        except Malformed as error:
            raise TypeError(f"{name} returned {short(found)}: {error}") from error
        return Parsed(calls, [], "" if calls else text)


def tool_format(given: str | Callable[[str], Any] | ToolFormat | None, tokenizer: Any = None) -> ToolFormat:
    """The format that an option names.

    Args:
        given: A name of `FORMATS`, a function (see `FunctionFormat`), its import path, or an object with `parse` and
            `stop_strings`; None: what the chat template of `tokenizer` writes.
        tokenizer: As in transformers.

    Returns:
        The format.

    Raises:
        ValueError: If there is none of that name, or the template's is unknown.
    """
    if given is None:
        return detect(tokenizer)
    label = f"tool_options.format={given!r}"
    if isinstance(given, str) and given in FORMATS:
        return FORMATS[given]
    if isinstance(given, str) and is_import_path(given):
        given = import_object(given, label)
    if isinstance(given, type):
        given = given()
    if callable(getattr(given, "parse", None)):
        stops = getattr(given, "stop_strings", None)
        if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"{label}: its stop_strings={stops!r} must be a tuple of texts")
        return given  # type: ignore[return-value]
    if callable(given):
        return FunctionFormat(given)
    raise ValueError(f"{label} must be {', '.join(map(repr, FORMATS))}, a function, or the import path of one")


def detect(tokenizer: Any) -> ToolFormat:
    """The built-in format that a chat template writes calls in, found by rendering a call of a tool.

    Args:
        tokenizer: As in transformers.

    Returns:
        The format.

    Raises:
        ValueError: If there is no chat template, or none of the built-in formats reads what it writes.
    """
    more = f"; give tool_options.format: {', '.join(map(repr, FORMATS))}, a function, or the import path of one"
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"tools need to know how calls are written, and the tokenizer has no chat template{more}")
    written, failure = "", None
    for arguments in (_ARGUMENTS, json.dumps(_ARGUMENTS)):  # templates differ in which of the two they take
        try:
            written, turn = _rendered_call(tokenizer, arguments)
        except Exception as error:  # whatever a template raises: it is a program of its own
            failure = error
            continue
        for format_ in FORMATS.values():
            if _reads(format_, written) or _reads(format_, turn):
                return format_
    if failure is not None and not written:
        raise ValueError(f"the chat template cannot write calls of tools: {failure}{more}") from failure
    raise ValueError(f"the chat template writes calls of tools in no known form ({short(written)}){more}")


def _rendered_call(tokenizer: Any, arguments: Mapping[str, str] | str) -> tuple[str, str]:
    """What a template writes behind a question that is answered with a call, and what of it is the policy's turn."""
    call = {"id": "probe0001", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    question = [{"role": "user", "content": _QUESTION}]
    answered = [*question, {"role": "assistant", "content": "", "tool_calls": [call]}]
    render = functools.partial(tokenizer.apply_chat_template, tools=[_PROBE_SCHEMA], tokenize=False)
    text, prompt = render(answered), render(question, add_generation_prompt=True)
    common = next((place for place, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(prompt))
    return text[text.rindex(_QUESTION) + len(_QUESTION) :], text[common:]


def _reads(format_: ToolFormat, written: str) -> bool:
    """Whether a format reads the probe's call and nothing else."""
    parsed = format_.parse(written)
    return [(one.name, one.arguments) for one in parsed.calls] == [(_NAME, _ARGUMENTS)] and not parsed.errors
