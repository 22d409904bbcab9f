"""Row formats: recognised by their columns, checked, and turned into one canonical `Example`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Message = dict[str, Any]
Text = str | list[Message]

TEXT = "text"
PROMPT_COMPLETION = "prompt/completion"
MESSAGES = "messages"
ALPACA = "alpaca"
SHAREGPT = "sharegpt"
PREFERENCE = "preference"
IMPLICIT_PREFERENCE = "preference with implicit prompt"
SCORED = "scored completions"
UNPAIRED = "unpaired preference"
PROMPT = "prompt only"

# Columns that a format is recognised by, most specific first.
COLUMNS: dict[str, tuple[str, ...]] = {
    PREFERENCE: ("prompt", "chosen", "rejected"),
    IMPLICIT_PREFERENCE: ("chosen", "rejected"),
    SCORED: ("prompt", "completions", "rewards"),
    UNPAIRED: ("prompt", "completion", "label"),
    PROMPT_COMPLETION: ("prompt", "completion"),
    MESSAGES: ("messages",),
    SHAREGPT: ("conversations",),
    ALPACA: ("instruction", "output"),
    PROMPT: ("prompt",),
    TEXT: ("text",),
}

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Example:
    """One row in canonical form; a field that the row does not have is None.

    Attributes:
        prompt: Plain text or messages.
        completion: Plain text or messages that follow the prompt.
        chosen: The preferred completion.
        rejected: The other completion.
        text: A document.
        messages: A whole conversation, each assistant turn of which is a target.
        label: Whether the completion is desirable (unpaired preferences).
        tools: Tool descriptions for the chat template.
        used: Names of the columns that the prompt came from.
    """

    prompt: Text | None = None
    completion: Text | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    text: str | None = None
    messages: list[Message] | None = None
    label: bool | None = None
    tools: list[Any] | None = None
    used: frozenset[str] = field(default_factory=frozenset)


def present(row: Mapping[str, Any]) -> set[str]:
    """Columns that have a value (tables fill missing columns with None)."""
    return {name for name, value in row.items() if value is not None}


def recognise(row: Mapping[str, Any], allowed: Collection[str] = tuple(COLUMNS)) -> str | None:
    """Name of the most specific of the allowed formats whose columns the row has, or None.

    Completions with a label of desirability are never taken without it: half of them are not to be learnt.

    >>> recognise({"prompt": "1+1=", "completion": "2", "source": "a"})
    'prompt/completion'
    >>> recognise({"prompt": "a", "chosen": "b", "rejected": "c", "text": "d"}, ["text"])
    'text'
    """
    columns = present(row)
    for name, needed in COLUMNS.items():
        if not columns.issuperset(needed):
            continue
        if name == UNPAIRED and _label(row["label"]) is None:
            continue  # a `label` that is no yes or no is just another column
        if name in allowed:
            return name
        if name == UNPAIRED:
            allowed = set(allowed) - {PROMPT_COMPLETION}
    return None


def describe(names: Sequence[str]) -> str:
    """The columns of these formats in words, for error messages.

    >>> describe(["text", "messages"])
    '[text] or [messages]'
    """
    return " or ".join(f"[{', '.join(COLUMNS[name])}]" for name in names)


def normalise(row: Mapping[str, Any], name: str, *, as_chat: bool = False) -> Example | None:
    """Turn a row of format `name` into an `Example`.

    Args:
        row: The row.
        name: Its format, one of `COLUMNS`.
        as_chat: Turn plain prompts and completions into messages; Alpaca rows become a conversation instead of the
            "### Instruction:" text.

    Returns:
        The example, or None for scored completions that all have the same reward.

    Raises:
        ValueError: A column is missing or holds the wrong kind of value; the message says which and what was found.
    """
    missing = [column for column in COLUMNS[name] if row.get(column) is None]
    if missing:
        raise ValueError(
            f"needs column{'s' if len(missing) > 1 else ''} {', '.join(missing)} (format: {name}); "
            f"found {sorted(present(row))}"
        )
    return _NORMALISERS[name](row, as_chat)


def split_conversation(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """A conversation as (prompt, last assistant turn); the second is empty where no assistant turn ends it."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None or last != len(messages) - 1:
        return messages, []
    return messages[:last], messages[last:]


def _plain(row: Mapping[str, Any], column: str, value: Any = None) -> str:
    value = row[column] if value is None else value
    if not isinstance(value, str):
        raise ValueError(f"column {column} must be a string, found {type(value).__name__}: {_short(value)}")
    return value


def _text(row: Mapping[str, Any], column: str, value: Any = None) -> Text:
    value = row[column] if value is None else value
    return value if isinstance(value, str) else _messages(column, value)


def _messages(column: str, value: Any) -> list[Message]:
    if isinstance(value, Mapping) and "role" in value:
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError(
            f"column {column} must be a string or a list of messages, found {type(value).__name__}: {_short(value)}"
        )
    if not value:
        raise ValueError(f"column {column} is an empty list of messages")
    return [_message(column, number, message) for number, message in enumerate(value)]


def _message(column: str, number: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"column {column}: message {number} must be a mapping, found {_short(message)}")
    clean: dict[str, Any] = _without_null(message)
    if "role" not in clean and "from" in clean:
        role = _SHAREGPT_ROLES.get(str(clean.pop("from")).lower())
        if role is None:
            raise ValueError(
                f"column {column}: message {number} is from {message['from']!r}; known: {sorted(_SHAREGPT_ROLES)}"
            )
        clean = {"role": role, "content": clean.pop("value", None), **clean}
    if not isinstance(clean.get("role"), str):
        raise ValueError(f"column {column}: message {number} needs a role, found the keys {sorted(clean)}")
    if not isinstance(clean.get("content"), (str, list)) and "tool_calls" not in clean:
        raise ValueError(f"column {column}: message {number} needs a content string, found the keys {sorted(clean)}")
    return clean


def _without_null(value: Any) -> Any:
    """The value without keys that hold None: Arrow tables give every mapping the keys of all the others."""
    if isinstance(value, Mapping):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            return json.loads(tools) or None if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"column tools is not valid JSON: {error.msg}") from None
    return _without_null(list(tools)) if tools else None


def _label(value: Any) -> bool | None:
    """A label as a truth value (tables of text hold it as "true" or "false"), or None where it is none."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _chat_prompt(prompt: Text, as_chat: bool) -> Text:
    return [{"role": "user", "content": prompt}] if as_chat and isinstance(prompt, str) else prompt


def _reply(prompt: Text, completion: Text) -> Text:
    """A completion in the form its prompt has."""
    if isinstance(prompt, list) and isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    if isinstance(prompt, str) and isinstance(completion, list):
        raise ValueError("the completion is a list of messages but the prompt is a plain string; use one form for both")
    return completion


def _from_text(row: Mapping[str, Any], as_chat: bool) -> Example:
    return Example(text=_plain(row, "text"), used=frozenset({"text"}))


def _from_prompt(row: Mapping[str, Any], as_chat: bool) -> Example:
    return Example(
        prompt=_chat_prompt(_text(row, "prompt"), as_chat), tools=_tools(row), used=frozenset({"prompt", "tools"})
    )


def _from_prompt_completion(row: Mapping[str, Any], as_chat: bool) -> Example:
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    prompt = _chat_prompt(prompt, as_chat or isinstance(completion, list))
    return Example(
        prompt=prompt,
        completion=_reply(prompt, completion),
        tools=_tools(row),
        used=frozenset({"prompt", "tools"}),
    )


def _from_unpaired(row: Mapping[str, Any], as_chat: bool) -> Example:
    example = _from_prompt_completion(row, as_chat)
    label = _label(row["label"])
    if label is None:
        raise ValueError(f"column label must be true or false, found {_short(row['label'])}")
    return replace(example, label=label)


def _conversation(row: Mapping[str, Any], column: str) -> Example:
    messages = _messages(column, row[column])
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    prompt, completion = split_conversation(messages)
    used = frozenset({column, "tools", "system"})
    return Example(messages=messages, prompt=prompt, completion=completion or None, tools=_tools(row), used=used)


def _from_messages(row: Mapping[str, Any], as_chat: bool) -> Example:
    return _conversation(row, "messages")


def _from_sharegpt(row: Mapping[str, Any], as_chat: bool) -> Example:
    return _conversation(row, "conversations")


def _from_alpaca(row: Mapping[str, Any], as_chat: bool) -> Example:
    instruction, output = _plain(row, "instruction"), _plain(row, "output")
    extra = _plain(row, "input") if row.get("input") else ""
    used = frozenset({"instruction", "input", "system", "history"})
    history = row.get("history") or []
    system = row.get("system")
    if not as_chat:
        if history:
            raise ValueError("column history needs a tokenizer with a chat template (or chat_template=...)")
        parts = [system] if system else []
        parts += [f"### Instruction:\n{instruction}"] + ([f"### Input:\n{extra}"] if extra else [])
        return Example(prompt="\n\n".join([*parts, "### Response:\n"]), completion=output, used=used)
    messages = [{"role": "system", "content": system}] if system else []
    for turn in history:
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise ValueError(f"column history must be a list of [question, answer] pairs, found {_short(turn)}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages.append({"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction})
    return Example(prompt=messages, completion=[{"role": "assistant", "content": output}], used=used)


def _from_preference(row: Mapping[str, Any], as_chat: bool) -> Example:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise ValueError("columns chosen and rejected must both be strings or both be lists of messages")
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen[0]["role"] in ("user", "system"):
        # Some sets repeat the whole conversation in both columns beside the prompt: the conversation counts.
        return _from_implicit(row, as_chat)
    prompt = _chat_prompt(_text(row, "prompt"), as_chat or isinstance(chosen, list))
    return Example(
        prompt=prompt,
        chosen=_reply(prompt, chosen),
        rejected=_reply(prompt, rejected),
        tools=_tools(row),
        used=frozenset({"prompt", "tools"}),
    )


def _from_implicit(row: Mapping[str, Any], as_chat: bool) -> Example:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    used = frozenset({"prompt", "tools", "chosen", "rejected"})
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _common_prompt(chosen, rejected)
        prompt = _chat_prompt(chosen[:cut], as_chat)
        sides = (chosen[cut:].lstrip(), rejected[cut:].lstrip()) if as_chat else (chosen[cut:], rejected[cut:])
        return Example(prompt=prompt, chosen=_reply(prompt, sides[0]), rejected=_reply(prompt, sides[1]), used=used)
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise ValueError("columns chosen and rejected must both be strings or both be lists of messages")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise ValueError("chosen and rejected share no first message, so no prompt can be taken from them")
    return Example(
        prompt=chosen[:shared], chosen=chosen[shared:], rejected=rejected[shared:], tools=_tools(row), used=used
    )


def _common_prompt(chosen: str, rejected: str) -> int:
    """Length of the shared prompt: up to the last "Assistant:" marker in common, else to a word boundary."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    marker = "\n\nAssistant:"
    found = chosen.rfind(marker, 0, shared)
    if found >= 0:
        return found + len(marker)
    ends = min(len(chosen), len(rejected)) == shared  # one side is a prefix of the other
    while shared > 0 and (ends or not chosen[shared].isspace()):
        shared -= 1
        ends = False
    return shared


def _from_scored(row: Mapping[str, Any], as_chat: bool) -> Example | None:
    completions, rewards = row["completions"], row["rewards"]
    for column, value in (("completions", completions), ("rewards", rewards)):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"column {column} must be a list, found {type(value).__name__}")
    if len(completions) != len(rewards) or len(completions) < 2:
        raise ValueError(
            f"columns completions and rewards must have the same length of at least 2, found {len(completions)} "
            f"and {len(rewards)}"
        )
    scores = []
    for reward in rewards:
        if isinstance(reward, bool) or not isinstance(reward, (int, float)) or reward != reward:
            raise ValueError(f"column rewards must hold numbers, found {_short(reward)}")
        scores.append(float(reward))
    if max(scores) == min(scores):
        return None
    chosen = _text(row, "completions", completions[scores.index(max(scores))])
    rejected = _text(row, "completions", completions[scores.index(min(scores))])
    prompt = _chat_prompt(_text(row, "prompt"), as_chat or isinstance(chosen, list))
    return Example(
        prompt=prompt,
        chosen=_reply(prompt, chosen),
        rejected=_reply(prompt, rejected),
        tools=_tools(row),
        used=frozenset({"prompt", "tools"}),
    )


_NORMALISERS: dict[str, Callable[[Mapping[str, Any], bool], Example | None]] = {
    TEXT: _from_text,
    PROMPT_COMPLETION: _from_prompt_completion,
    MESSAGES: _from_messages,
    SHAREGPT: _from_sharegpt,
    ALPACA: _from_alpaca,
    PREFERENCE: _from_preference,
    IMPLICIT_PREFERENCE: _from_implicit,
    SCORED: _from_scored,
    UNPAIRED: _from_unpaired,
    PROMPT: _from_prompt,
}
