"""The built-in formats of calls: what stands in a turn's text, and what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from alignment_modules.functional.http import short

_THOUGHT, _END_OF_THOUGHT = "<think>", "</think>"
_JSON_SPACE = " \t\r\n"
MAX_DEPTH = 64
"""Levels of lists and objects that a call may have."""
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"


@dataclass(frozen=True)
class Call:
    """A call as it was written; whether there is such a tool is another's question.

    Attributes:
        name: Of the tool.
        arguments: By name.
        as_text: Whether arguments are text because the format has no types (see `Tool.check`).
    """

    name: str
    arguments: dict[str, Any]
    as_text: bool = False


@dataclass(frozen=True)
class Parsed:
    """What a turn's text holds.

    Attributes:
        calls: Those that could be read, in order.
        errors: What was wrong with those that could not, one text each, for the policy.
        content: The text around them, those before and behind joined; the whole text where there is no call.
    """

    calls: list[Call]
    errors: list[str]
    content: str


class ToolFormat(Protocol):
    """A way to write calls."""

    stop_strings: tuple[str, ...]
    """Strings that end a turn beside the template's own end; for forms without one."""

    def parse(self, text: str) -> Parsed:
        """The calls of a turn's text; never raises for what a policy wrote."""


class NoCalls:
    """How calls are written where there is nothing to call: a turn is what it says, and the last."""

    stop_strings: tuple[str, ...] = ()

    def parse(self, text: str) -> Parsed:
        """No calls, whatever a turn's text looks like."""
        return Parsed([], [], text)


class Malformed(ValueError):
    """A call that cannot be read; `end` is where the text behind it begins."""

    def __init__(self, message: str, end: int = 0) -> None:
        super().__init__(message)
        self.end = end


def call_of(value: Any, *keys: str) -> Call:
    """A call from what its JSON says.

    Args:
        value: What was read.
        keys: What the arguments may be called, the usual name first.

    Raises:
        Malformed: If it is no object with a name and, under one of the keys, an object of arguments.
    """
    if not isinstance(value, Mapping):
        raise Malformed(f'a call must be an object with "name" and "{keys[0]}", not {short(value)}')
    name, key = value.get("name"), next((key for key in keys if key in value), None)
    if not isinstance(name, str) or not name:
        raise Malformed(f'a call must have a text "name", which {short(value)} has not')
    if key is None:
        raise Malformed(f'the call of {short(name)} has no "{keys[0]}"')
    if not isinstance(value[key], Mapping):
        raise Malformed(f'"{key}" of the call of {short(name)} must be an object, not {short(value[key])}')
    return Call(name, dict(value[key]))


class _Scanned:
    """A format whose calls begin with a mark; what stands within thoughts is no call."""

    stop_strings: tuple[str, ...] = ()
    mark: re.Pattern[str]
    """What a call begins with."""

    def parse(self, text: str) -> Parsed:
        """The calls of a turn's text."""
        calls: list[Call] = []
        errors: list[str] = []
        around: list[str] = []
        begin, place = 0, self._behind_thoughts(text)
        while found := self._next(text, place):
            around.append(text[begin : found.start()])
            try:
                call, place = self._read(text, found)
                calls.append(call)
            except Malformed as error:
                errors.append(str(error))
                place = error.end
            begin = place
        around.append(text[begin:])
        content = "\n".join(filter(None, map(str.strip, around))) if calls or errors else text
        return Parsed(calls, errors, content)

    def _read(self, text: str, found: re.Match[str]) -> tuple[Call, int]:
        raise NotImplementedError

    def _next(self, text: str, place: int) -> re.Match[str] | None:
        """The next mark of a call outside of thoughts."""
        while found := self.mark.search(text, place):
            thought = text.find(_THOUGHT, place, found.start())
            if thought < 0:
                return found
            end = text.find(_END_OF_THOUGHT, thought)
            if end < 0:
                return None
            place = end + len(_END_OF_THOUGHT)
        return None

    @staticmethod
    def _behind_thoughts(text: str) -> int:
        """Where a turn begins whose thought was opened by the prompt."""
        end, start = text.find(_END_OF_THOUGHT), text.find(_THOUGHT)
        return 0 if end < 0 or 0 <= start < end else end + len(_END_OF_THOUGHT)


class JsonTags(_Scanned):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes, Qwen2.5 and Qwen3 write calls."""

    opening, closing = "<tool_call>", "</tool_call>"
    mark = re.compile(re.escape("<tool_call>"))

    def _read(self, text: str, found: re.Match[str]) -> tuple[Call, int]:
        try:
            value, end = _json_at(text, found.end())
        except ValueError as error:
            raise self._blame(text, found.end(), f"its JSON cannot be read: {error}") from error
        end = _skip(text, end)
        if not text.startswith(self.closing, end):
            raise self._blame(text, end, f"{self.closing} must follow its JSON")
        end += len(self.closing)
        try:
            return call_of(value, "arguments", "parameters"), end
        except Malformed as error:
            raise Malformed(str(error), end) from error

    def _blame(self, text: str, place: int, what: str) -> Malformed:
        """What is wrong with a call: it has no end, or holds another, or else `what`."""
        end, depth = place, 1
        while depth:
            closing, opening = text.find(self.closing, end), text.find(self.opening, end)
            if closing < 0:
                return Malformed(f"a call is not finished: {self.closing} is missing", len(text))
            if 0 <= opening < closing:
                depth, end, what = depth + 1, opening + len(self.opening), "a call stands within a call"
            else:
                depth, end = depth - 1, closing + len(self.closing)
        return Malformed(what if what.startswith("a call") else f"a call is malformed: {what}", end)


class QwenXml(_Scanned):
    """`<function=name><parameter=key>value</parameter></function>`, in `<tool_call>` or not, as Qwen3-Coder does."""

    mark = re.compile(r"(?:<tool_call>\s*)?<function=|<tool_call>")
    _name = re.compile(r"([^<>\n]+)>\s*")
    _parameter = re.compile(
        r"<parameter=([^<>\n]+)>(?:\n)?(.*?)(?:\n)?</parameter>(?=\s*(?:<parameter=|</function>))\s*", re.DOTALL
    )

    def _read(self, text: str, found: re.Match[str]) -> tuple[Call, int]:
        tagged = text.startswith("<tool_call>", found.start())
        closing = "</tool_call>" if tagged else "</function>"
        if not found[0].endswith("<function="):
            raise self._blame(text, found.end(), closing, "<function=...> must follow <tool_call>")
        head = self._name.match(text, found.end())
        if head is None:
            raise self._blame(text, found.end(), closing, "<function=...> names no tool")
        arguments, place = {}, head.end()
        while parameter := self._parameter.match(text, place):
            if "<function=" in parameter[2] and "</function>" not in parameter[2]:
                break
            if parameter[1].strip() in arguments:
                raise self._blame(text, place, closing, f"it gives {parameter[1].strip()!r} twice")
            arguments[parameter[1].strip()], place = parameter[2], parameter.end()
        if not text.startswith("</function>", place):
            raise self._blame(text, place, closing, "<parameter=...>value</parameter> or </function> must follow")
        end = place + len("</function>")
        if tagged:
            end = _skip(text, end)
            if not text.startswith(closing, end):
                raise self._blame(text, end, closing, "</tool_call> must follow </function>")
            end += len(closing)
        return Call(head[1].strip(), arguments, as_text=True), end

    def _blame(self, text: str, place: int, closing: str, what: str) -> Malformed:
        end, inner = text.find(closing, place), text.find("<function=", place)
        if end < 0:
            return Malformed(f"a call is not finished: {closing} is missing", len(text))
        if 0 <= inner < end and not what.startswith("<function"):
            what = "a call stands within it"
        return Malformed(f"a call is malformed: {what}", end + len(closing))


class Llama(_Scanned):
    """`{"name": ..., "parameters": {...}}` at the start of a turn or behind `<|python_tag|>`, as Llama 3 writes calls.

    Several stand behind each other, with `;`, `,` or space between them. A turn that begins with another JSON object is
    an answer.
    """

    _tag = re.compile(r"<\|python_tag\|>\s*")
    _first = re.compile(r'\s*(?=\{\s*"(?:name|parameters|arguments|type)"\s*:)')
    _following = re.compile(r'[;,\s]*(?=\{\s*"(?:name|parameters|arguments|type)"\s*:)')

    def _next(self, text: str, place: int) -> re.Match[str] | None:
        """An object at the start, or one that follows a call at once, or a tag anywhere."""
        begin = self._behind_thoughts(text)
        if text.find(_THOUGHT) == begin + len(text[begin:]) - len(text[begin:].lstrip()):
            ended = text.find(_END_OF_THOUGHT, begin)
            begin = len(text) if ended < 0 else ended + len(_END_OF_THOUGHT)
        found = self._first.match(text, begin) if place <= begin else self._following.match(text, place)
        return found or self._tag.search(text, max(place, begin))

    def _read(self, text: str, found: re.Match[str]) -> tuple[Call, int]:
        try:
            value, end = _json_at(text, found.end())
        except ValueError as error:
            raise Malformed(f"a call is malformed: its JSON cannot be read: {error}", len(text)) from error
        try:
            return call_of(value, "parameters", "arguments"), end
        except Malformed as error:
            raise Malformed(str(error), end) from error


def _json_at(text: str, place: int) -> tuple[Any, int]:
    """The JSON value that begins behind the space at a place, and where it ends."""
    try:
        value, end = json.JSONDecoder(parse_constant=_refuse).raw_decode(text, _skip(text, place))
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos - place}") from error
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        if not all(map(_is_unicode, level)):
            raise ValueError("it holds half a surrogate pair, which is no character")
        level = [part for one in level for part in _parts(one)]
    return value, end


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _is_unicode(value: Any) -> bool:
    return not isinstance(value, str) or not re.search("[\ud800-\udfff]", value)


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in _JSON_SPACE:
        place += 1
    return place


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
