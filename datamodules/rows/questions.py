"""The prompt of a row, whatever its columns are called: one reading for all formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.rows.messages import (
    Message,
    Text,
    conversation,
    from_json,
    is_conversation_text,
    plain_list,
    short,
    text_of,
    tool_list,
)

# Columns that may hold the question; `input` belongs to `instruction` where there is one.
QUESTIONS = ("prompt", "question", "query", "instruction", "input")
SYSTEMS = ("system", "system_prompt")
# Columns that hold what is not read; dropped in silence they would change what a row means.
NOT_READ = ("image", "images", "audio", "audios", "video", "videos", "chat_template_kwargs")


@dataclass(frozen=True)
class Prompt:
    """A row's prompt.

    Attributes:
        text: Plain text or messages, with the system prompt and earlier turns.
        used: Names of the columns that it came from and that need not be passed on.
        tools: Tool descriptions for the chat template.
    """

    text: Text
    used: frozenset[str]
    tools: list[Any] | None


def read_prompt(row: Mapping[str, Any], as_chat: bool) -> Prompt:
    """The question of a row with its system prompt, history and tools.

    Args:
        row: The row.
        as_chat: Turn a plain question into messages.

    Raises:
        ValueError: Two columns hold different questions, a column has the wrong type, or something is there that a
            plain prompt cannot hold.
    """
    name = question_column(row)
    question = read_text(name, row[name])
    history = row.get("history")
    history = from_json("history", history) if isinstance(history, str) and history.strip() else plain_list(history)
    if name == "instruction":
        extra = optional_text(row, "input")
        if isinstance(question, str) and not as_chat:
            middle = f"\n\n### Input:\n{extra}" if extra else ""
            question = f"### Instruction:\n{question}{middle}\n\n### Response:\n"
        elif extra and isinstance(question, str):
            question = f"{question}\n\n{extra}"
        elif extra:
            raise ValueError("column input cannot join an instruction that is a list of messages")
    if isinstance(question, str) and as_chat:
        question = [{"role": "user", "content": question}]
        question = [*_history(history or []), *question]
    elif history:
        raise ValueError(
            "column history needs a tokenizer with a chat template (or chat_template=...) and a plain question"
        )
    used = {"instruction", "input", "system", "history"} if name == "instruction" else {"prompt", "tools"}
    return Prompt(with_system(row, question), frozenset(used), read_tools(row))


def question_name(row: Mapping[str, Any]) -> str | None:
    """Name of the first column that may hold the question."""
    return next((name for name in QUESTIONS if row.get(name) is not None), None)


def question_column(row: Mapping[str, Any]) -> str:
    """Name of the column that holds a row's question.

    Raises:
        ValueError: None does, or two hold different ones.
    """
    there = [name for name in QUESTIONS if row.get(name) is not None]
    if not there:
        raise ValueError(f"needs a column prompt; found {sorted(row)}")
    if "instruction" in there and "input" in there:
        there.remove("input")
    texts = {name: _said(row[name]).strip() for name in there}
    filled = [name for name in there if texts[name]]
    if not filled:
        return there[0]
    first = filled[0]
    for other in filled[1:]:
        if texts[other] not in texts[first]:
            raise ValueError(
                f"columns {first} and {other} both hold a question, and {first} does not contain the other; rename the "
                f"one that is no question, as in columns={{'{other}': '{other}_column'}}"
            )
    return first


def _said(value: Any) -> str:
    """All text of a question, to compare two with."""
    value = plain_list(value)
    if isinstance(value, list):
        return "\n".join(map(_said, value))
    if isinstance(value, Mapping):
        return _said(value.get("content") or value.get("value") or value.get("text") or "")
    return value if isinstance(value, str) else short(value)


def read_text(column: str, value: Any) -> Text:
    """Plain text, or messages, also as JSON.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, str) and not is_conversation_text(column, value):
        return str(value)
    return conversation(column, value)


def optional_text(row: Mapping[str, Any], column: str) -> str:
    """Text of a column, empty where the row has none.

    Raises:
        ValueError: It is no text.
    """
    value = row.get(column)
    return "" if value is None else text_of(f"column {column}", plain_list(value))


def with_system(row: Mapping[str, Any], prompt: Text) -> Text:
    """The prompt behind the system prompt that stands in a column of its own.

    Raises:
        ValueError: There are two different ones.
    """
    systems = {column: text for column in SYSTEMS if (text := optional_text(row, column))}
    if len(set(systems.values())) > 1:
        raise ValueError("columns system and system_prompt hold different texts; rename one with columns=...")
    if not systems:
        return prompt
    column, system = next(iter(systems.items()))
    if isinstance(prompt, str):
        return f"{system}\n\n{prompt}" if prompt else system
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"].strip() != system.strip():
        raise ValueError(f"column {column} and the first message hold different system prompts; rename the column")
    return prompt


def read_tools(row: Mapping[str, Any]) -> list[Any] | None:
    """Tool descriptions of a row, from `tools` or the older `functions`."""
    found = [tools for column in ("tools", "functions") if (tools := tool_list(column, row.get(column)))]
    if len(found) > 1:
        raise ValueError("columns tools and functions both hold tools; rename one with columns=...")
    return found[0] if found else None


def _history(turns: Any) -> list[Message]:
    if not isinstance(turns, list):
        raise ValueError(f"column history must be a list of [question, answer] pairs, found {short(turns)}")
    messages = []
    for turn in map(plain_list, turns):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"column history must be a list of [question, answer] pairs, found {short(turn)}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages
