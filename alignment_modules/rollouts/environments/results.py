"""What a tool returned, as text that a policy reads. Of the standard library alone: a tool's own process loads it."""

import json
from dataclasses import dataclass
from typing import Any, Literal

Reason = Literal["", "unknown_tool", "arguments", "malformed", "raised", "time_limit", "busy", "died"]


@dataclass(frozen=True)
class Result:
    """What a call is answered with.

    Attributes:
        text: What the policy reads; of a call that failed, what was wrong with it.
        failed: Whether it failed.
        reason: Why: the tool is unknown, does not take such arguments, raised, was late, is still busy with an earlier
            call of the same environment, or its process died; "malformed": the call could not be read. "": it did not.
    """

    text: str
    failed: bool = False
    reason: Reason = ""


class Failure(Exception):
    """What became of something that ran: the text that a policy reads, and why (see `Result`)."""

    def __init__(self, text: str, reason: Reason) -> None:
        super().__init__(text)
        self.text, self.reason = text, reason


def late(seconds: float) -> Failure:
    """The failure of what gave no answer in time."""
    return Failure(f"Error: no answer within {seconds:g} seconds", "time_limit")


def text_of(value: Any, max_characters: int) -> str:
    """What a tool returned, as text: itself, bytes as UTF-8, lists, objects, None and booleans as JSON, else `str`.

    Args:
        value: What it returned.
        max_characters: More than these are cut, and the end says so.

    Returns:
        The text, without half surrogates, which no tokenizer takes; "\ufffd" stands for bytes that are no UTF-8.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        # a byte is at least a quarter of a character, so no more of them are of use
        text = bytes(value[: 4 * max_characters + 4]).decode("utf-8", "replace")
    elif value is None or isinstance(value, bool | list | tuple | dict):
        try:
            text = json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError):  # keys of other types, a list within itself
            text = str(value)
    else:
        text = str(value)
    return cut(text, max_characters).encode("utf-8", "replace").decode("utf-8")


def cut(text: str, max_characters: int) -> str:
    """A text of at most `max_characters` and a note of what is missing.

    >>> cut("a" * 8, 5)
    'aaaaa [cut: 3 of 8 characters]'
    """
    if len(text) <= max_characters:
        return text
    return f"{text[:max_characters]} [cut: {len(text) - max_characters} of {len(text)} characters]"


def error_text(error: BaseException, max_characters: int) -> str:
    """What a policy reads of an error: its type and message, no traceback."""
    try:
        message = str(error)
    except Exception:  # an error whose own message fails is still one
        message = ""
    return text_of(f"Error: {type(error).__name__}: {message}".removesuffix(": "), max_characters)
