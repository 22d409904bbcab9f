"""One message or conversation, however its owner wrote it, in one canonical form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Message = dict[str, Any]
Text = str | list[Message]

# Spellings of roles, in lower case; every other role is refused.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "chatbot", "model", "ai", "function_call"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
}
# Keys that say whether a reply is to be learnt, and (`weight`) by how much.
MARKS = ("learn", "weight", "train", "loss", "mask")
LARGEST_WEIGHT = float(np.finfo(np.float32).max)
# Keys that hold what is no text, or that ask for a loss that is not there.
_REFUSED = ("image", "images", "audio", "audios", "video", "videos", "train_detail", "loss_mask")
_WORDS = {
    **dict.fromkeys(("true", "yes", "1", "1.0", "good", "desirable", "chosen"), True),
    **dict.fromkeys(("false", "no", "0", "0.0", "-1", "-1.0", "bad", "undesirable", "rejected"), False),
}


class Arguments(dict[str, Any]):
    """Arguments of a call: a mapping whose text is its JSON, for templates that convert it and those that print it.

    Args:
        arguments: Values by name.
        text: The JSON that the owner wrote, if it was text.
    """

    def __init__(self, arguments: Mapping[str, Any], text: str | None = None) -> None:
        super().__init__(arguments)
        self.text = text

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False) if self.text is None else self.text

    def __add__(self, text: str) -> str:
        return str(self) + text

    def __radd__(self, text: str) -> str:
        return text + str(self)


def truth(value: Any) -> bool | None:
    """A mark or label as a truth value, or None where it is none.

    Truth values are true and false, 1 and 0 (or -1), these as NumPy or torch scalars, and the words true, false, yes,
    no, good, bad, desirable, undesirable, chosen and rejected.

    >>> truth("Good"), truth(0), truth("hard"), truth(3)
    (True, False, None, None)
    """
    value = scalar(value)
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return value > 0 if isinstance(value, (bool, int, float)) and value in (1, 0, -1) else None


def scalar(value: Any) -> Any:
    """A NumPy or torch value of one element as Python's own; everything else as it is."""
    single = hasattr(value, "item") and hasattr(value, "ndim") and getattr(value, "size", None) is not None
    if not single:
        return value
    count = value.numel() if hasattr(value, "numel") else value.size
    return value.item() if count == 1 else value


def plain_list(value: Any) -> Any:
    """An array, a tensor or a tuple as a list; everything else as it is."""
    if hasattr(value, "tolist") and getattr(value, "ndim", None):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def short(value: Any) -> str:
    """A value in a few words, for messages."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deep nesting
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


def without_null(value: Any) -> Any:
    """The value without keys that hold None: Arrow tables give every mapping the keys of all the others."""
    if isinstance(value, (str, int, float)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    value = plain_list(value)
    return [without_null(item) for item in value] if isinstance(value, list) else value


def from_json(column: str, text: str) -> Any:
    """Value of a cell that holds JSON text.

    Raises:
        ValueError: The text is no JSON.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"column {column} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"column {column} is not valid JSON: {error}; found {short(text)}") from None


def is_conversation_text(column: str, text: str) -> bool:
    """Whether a string is the JSON of a list of messages.

    Raises:
        ValueError: It is such a list in Python's notation, which is not read.
    """
    start = text[:40].lstrip().replace(" ", "")
    if start.startswith(("[{'role':", "[{'from':", "[{'content':")):
        raise ValueError(f"column {column} holds messages in Python's notation; write them as JSON: {short(text)}")
    if not start.startswith("[{"):
        return False
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return all(
        isinstance(item, dict) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())
        for item in found
    )


def conversation(column: str, value: Any) -> list[Message]:
    """A conversation in canonical form.

    Each message has a `role` (user, assistant, system, tool), its `content` as text, for calls `tool_calls` whose
    arguments are `Arguments`, `learn` with False where a reply is marked as not to be learnt and with its weight where
    that is neither 0 nor 1, and all other keys that hold something.

    Args:
        column: Name of the column, for messages.
        value: A list of messages, one message, or either as JSON text.

    Raises:
        ValueError: A message lacks something, or holds what cannot be taken; the message says which and what.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = from_json(column, value)
    value = plain_list(value)
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError(
            f"column {column} must be a string or a list of messages, found {type(value).__name__}: {short(value)}"
        )
    if not value:
        raise ValueError(f"column {column} is an empty list of messages")
    return [_message(f"column {column}: message {number}", message) for number, message in enumerate(value)]


def shown(messages: Text | None) -> Text | None:
    """A prompt without the marks of what is not to be learnt."""
    if not isinstance(messages, list):
        return messages
    return [{key: value for key, value in message.items() if key != "learn"} for message in messages]


def tool_list(column: str, value: Any) -> list[Any] | None:
    """Descriptions of tools, given as a list, one mapping, or either as JSON text; None where there are none.

    Raises:
        ValueError: They are something else.
    """
    text = isinstance(value, str)
    if text:
        value = from_json(column, value) if value.strip() else None
    value = plain_list(value)
    if isinstance(value, Mapping):
        value = [value]
    if value is None or (isinstance(value, list) and not value):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) or callable(tool) for tool in value):
        raise ValueError(f"column {column} must be a list of mappings, found {short(value)}")
    if column == "functions":
        value = [{"type": "function", "function": tool} for tool in value]
    found: list[Any] = value if text else without_null(value)
    return found


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a mapping, found {short(message)}")
    clean: dict[str, Any] = without_null(message)
    refused = sorted(key for key in _REFUSED if key in clean and not _is_empty(clean[key]))
    if refused:
        raise ValueError(f"{where} has {refused[0]}, which is not read; only text is")
    spelling = clean.pop("role", None)
    source = clean.pop("from", None)
    spelling = source if spelling is None else spelling
    if not isinstance(spelling, str):
        raise ValueError(f"{where} needs a role, found the keys {sorted(map(str, message))}")
    role = ROLES.get(spelling.strip().lower())
    if role is None:
        raise ValueError(f"{where} is from {spelling!r}; known: {sorted(ROLES)}")
    content = clean.pop("content", None)
    for other in ("value", "text"):
        content = clean.pop(other, None) if content is None else content
    calls = _calls(where, clean)
    if spelling.strip().lower() == "function_call" and not calls:
        calls, content = [_call(where, _call_text(where, content))], ""
    if calls and role != "assistant":
        raise ValueError(f"{where} is from {spelling!r} and has tool_calls; only an assistant makes calls")
    learn = _mark(where, role, clean)
    found: Message = {"role": role, "content": _content(where, content, clean, bool(calls)), **clean}
    if calls:
        found["tool_calls"] = calls
    if learn != 1:
        found["learn"] = learn or False
    return found


def _is_empty(value: Any) -> bool:
    return isinstance(value, (str, list, dict)) and not value


def _content(where: str, content: Any, rest: Mapping[str, Any], has_calls: bool) -> str:
    if content is None and has_calls:
        return ""
    if content is None:
        raise ValueError(f"{where} needs a content string, found the keys {sorted(map(str, rest))}")
    return text_of(f"{where}: content", content)


def text_of(where: str, content: Any) -> str:
    """A text, or the parts of one joined.

    Raises:
        ValueError: It is something else, or a part is no text; the message names the type.
    """
    if isinstance(content, str):
        return content
    parts = [content] if isinstance(content, Mapping) else content
    if not isinstance(parts, list):
        raise ValueError(f"{where} must be a string, found {type(content).__name__}: {short(content)}")
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and kind not in ("text", "input_text", "output_text"):
            raise ValueError(f"{where} has a part of the type {kind!r}; only parts of the type 'text' are read")
        if not isinstance(text, str):
            raise ValueError(f"{where} must be a string or a list of text parts, found {short(part)}")
        texts.append(text)
    if not texts:
        raise ValueError(f"{where} is an empty list")
    return "".join(texts)


def read_weight(value: Any) -> float | None:
    """By how much something is to be learnt: a finite number of at least 0 that float32 holds; None: it is none.

    >>> read_weight(0.5), read_weight(True), read_weight(-1), read_weight("1")
    (0.5, 1.0, None, None)
    """
    number = scalar(value)
    if not isinstance(number, (bool, int, float)) or not 0 <= number <= LARGEST_WEIGHT:
        return None
    return float(number)


def _mark(where: str, role: str, clean: dict[str, Any]) -> float:
    """Takes the marks of what is (not) to be learnt off a message; by how much it is to be learnt."""
    learn = 1.0
    for name in MARKS:
        if name not in clean:
            continue
        value = clean.pop(name)
        found = read_weight(value) if name == "weight" else _learnt(name, value)
        if found is None:
            known = {"mask": "0 (not learnt) or 1 (learnt)", "weight": "a finite number of at least 0"}
            allowed = known.get(name, "0, 1, true or false")
            raise ValueError(f"{where} has {name}={short(value)}; it must be {allowed}")
        if found and role != "assistant":
            raise ValueError(f"{where} has {name}={short(value)}, but only an assistant's messages are learnt")
        learn *= found
    return learn if role == "assistant" else 1.0


def _learnt(name: str, value: Any) -> bool | None:
    """What a mark without a weight says; None: nothing that is allowed."""
    kinds = (str, bool) if name == "mask" else (str,)
    return None if isinstance(scalar(value), kinds) else truth(value)


def _calls(where: str, clean: dict[str, Any]) -> list[dict[str, Any]]:
    calls = clean.pop("tool_calls", None)
    calls = from_json(f"{where}: tool_calls", calls) if isinstance(calls, str) and calls.strip() else calls
    calls = [calls] if isinstance(calls, Mapping) else calls or []
    legacy = clean.pop("function_call", None)
    if legacy:
        calls = [*calls, _call_text(where, legacy) if isinstance(legacy, str) else legacy]
    if not isinstance(calls, list):
        raise ValueError(f"{where} has tool_calls that are no list: {short(calls)}")
    return [_call(where, call) for call in calls]


def _call_text(where: str, text: Any) -> Any:
    return from_json(f"{where}: function_call", text) if isinstance(text, str) else text


def _call(where: str, call: Any) -> dict[str, Any]:
    """A call as `{"function": {"name", "arguments"}}`, with its other keys."""
    call = call if isinstance(call, Mapping) and "function" in call else {"type": "function", "function": call}
    function = call["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} has a call without the name of a function: {short(function)}")
    arguments = function.get("arguments", function.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else None
    if text is not None:
        arguments = from_json(f"{where}: arguments", text) if text.strip() else {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where} has a call whose arguments are no mapping: {short(arguments)}")
    rest = {key: value for key, value in function.items() if key not in ("arguments", "parameters")}
    return {**call, "function": {**rest, "arguments": Arguments(arguments, text or None)}}
