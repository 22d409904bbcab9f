"""Row formats: recognised by their columns, checked, and turned into one canonical `Example`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, cast

from datamodules.rows.messages import Message, Text, conversation, plain_list, read_weight, scalar, short, truth
from datamodules.rows.questions import NOT_READ, QUESTIONS, read_prompt, read_text, read_tools, with_system

logger = logging.getLogger(__name__)

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

# Columns that a format is recognised by, most specific first; `prompt` may also be one of `questions.QUESTIONS`.
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
# Formats that show what to write; a label of desirability beside one says that some of it is not to be learnt.
DEMONSTRATIONS = (PROMPT_COMPLETION, MESSAGES, SHAREGPT, ALPACA)
SAMPLE = 100  # rows that a source is recognised by


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


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The first row with the first value of each of its empty columns from the next rows, to recognise a source by.

    A `label` counts wherever it stands. One that holds other values than two truth values (numbers of classes, words)
    is an ordinary column: it is left out of the summary, with a line in the log.
    """
    sample = list(islice(rows, SAMPLE))
    first = dict(sample[0])
    for row in sample[1:]:
        first.update({name: row.get(name) for name, value in first.items() if value is None})
    labels = [scalar(row["label"]) for row in sample if row.get("label") is not None]
    first.pop("label", None)
    truths = [truth(label) for label in labels]
    if labels and None not in truths:
        numbers = {label for label in labels if not isinstance(label, (str, bool))}
        if len(numbers) <= 2:
            return {**first, "label": truths[0]}
    if labels:
        logger.info(
            "column label holds no truth values (such as %s), so it is a column like any other", short(labels[0])
        )
    return first


def recognise(row: Mapping[str, Any], allowed: Collection[str] = tuple(COLUMNS)) -> str | None:
    """Name of the most specific of the allowed formats whose columns the row has, or None.

    Demonstrations with a label of desirability are never taken without it: half of them are not to be learnt.

    >>> recognise({"prompt": "1+1=", "completion": "2", "source": "a"})
    'prompt/completion'
    >>> recognise({"prompt": "a", "chosen": "b", "rejected": "c", "text": "d"}, ["text"])
    'text'
    """
    columns = _columns(row)
    labelled = truth(row.get("label")) is not None
    for name, needed in COLUMNS.items():
        shows = any(columns.issuperset(COLUMNS[other]) for other in DEMONSTRATIONS)
        if name == UNPAIRED:
            if labelled and shows and UNPAIRED in allowed:
                return UNPAIRED
            if labelled and shows:
                allowed = set(allowed) - set(DEMONSTRATIONS)
        elif name in allowed and columns.issuperset(needed):
            return name
    return None


def demonstration(row: Mapping[str, Any]) -> str:
    """Which of the demonstrations a row is, whatever its label."""
    return next(name for name in DEMONSTRATIONS if _columns(row).issuperset(COLUMNS[name]))


def _columns(row: Mapping[str, Any]) -> set[str]:
    columns = present(row)
    return columns | {"prompt"} if columns.intersection(QUESTIONS) else columns


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
        as_chat: Turn plain prompts and completions into messages; instructions become a conversation instead of the
            "### Instruction:" text.

    Returns:
        The example, or None for scored completions that all have the same reward.

    Raises:
        ValueError: A column is missing or holds the wrong kind of value; the message says which and what was found.
    """
    shown = DEMONSTRATIONS if name == UNPAIRED else (name,)
    columns = _columns(row)
    if not any(columns.issuperset(COLUMNS[other]) for other in shown):
        missing = [column for column in COLUMNS[name] if column not in columns]
        raise ValueError(
            f"needs column{'s' if len(missing) > 1 else ''} {', '.join(missing)} (format: {name}); "
            f"found {sorted(map(str, present(row)))}"
        )
    for column in NOT_READ:
        value = row.get(column)
        if (
            name not in (TEXT, PROMPT)
            and value is not None
            and not (isinstance(value, (str, list, dict)) and not value)
        ):
            raise ValueError(
                f"column {column} holds {short(value)}, which is not read; only text is. Rename the column"
            )
    if name == IMPLICIT_PREFERENCE and "prompt" in columns:
        name = PREFERENCE
    example = _NORMALISERS[name](row, as_chat)
    if example is not None and example.tools and isinstance(example.prompt, str):
        raise ValueError("column tools needs messages, or as_chat=true with a chat template")
    return example


def split_conversation(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """A conversation as (prompt, last assistant turn); the second is empty where no assistant turn ends it."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None or last != len(messages) - 1:
        return messages, []
    return messages[:last], messages[last:]


def _plain(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column} must be a string, found {type(value).__name__}: {short(value)}")
    return str(value)


def _reply(prompt: Text, column: str, reply: Text) -> Text:
    """A reply in the form its prompt has."""
    if isinstance(prompt, list) and isinstance(reply, str):
        return [{"role": "assistant", "content": reply}]
    if isinstance(prompt, str) and isinstance(reply, list):
        raise ValueError(
            f"column {column} is a list of messages but the prompt is a plain string; use one form for both"
        )
    return reply


def _from_text(row: Mapping[str, Any], as_chat: bool) -> Example:
    return Example(text=_plain(row, "text"), used=frozenset({"text"}))


def _from_prompt(row: Mapping[str, Any], as_chat: bool) -> Example:
    prompt = read_prompt(row, as_chat)
    return Example(prompt=prompt.text, tools=prompt.tools, used=prompt.used)


def _from_prompt_completion(row: Mapping[str, Any], as_chat: bool, column: str = "completion") -> Example:
    completion = read_text(column, row[column])
    prompt = read_prompt(row, as_chat or isinstance(completion, list))
    reply = _reply(prompt.text, column, completion)
    return Example(prompt=prompt.text, completion=reply, tools=prompt.tools, used=prompt.used)


def _from_alpaca(row: Mapping[str, Any], as_chat: bool) -> Example:
    return _from_prompt_completion({**row, "output": _plain(row, "output")}, as_chat, "output")


def _from_unpaired(row: Mapping[str, Any], as_chat: bool) -> Example:
    label = truth(row["label"]) if row.get("label") is not None else None
    if label is None:
        raise ValueError(f"column label must be true or false, found {short(row.get('label'))}")
    example = _NORMALISERS[demonstration(row)](row, as_chat)
    if example is None or not example.completion:
        raise ValueError("the conversation ends with no assistant message that the label could be about")
    _refuse_marks("completion", example.completion)
    return replace(example, messages=None, label=label)


def _from_conversation(row: Mapping[str, Any], column: str) -> Example:
    messages = cast(list[Message], with_system(row, conversation(column, row[column])))
    prompt, completion = split_conversation(messages)
    used = frozenset({column, "tools", "system"})
    return Example(messages=messages, prompt=prompt, completion=completion or None, tools=read_tools(row), used=used)


def _from_messages(row: Mapping[str, Any], as_chat: bool) -> Example:
    return _from_conversation(row, "messages")


def _from_sharegpt(row: Mapping[str, Any], as_chat: bool) -> Example:
    return _from_conversation(row, "conversations")


def _refuse_marks(column: str, reply: Text) -> None:
    for message in reply if isinstance(reply, list) else ():
        if (learn := message.get("learn", True)) is not True:
            mark = f"has the weight {learn:g}" if learn else "is marked as not to be learnt"
            raise ValueError(f"column {column} has a message that {mark}, but all of it is judged alike")


def row_weight(row: Mapping[str, Any]) -> float:
    """By how much a row is to be learnt: its column `weight`, 1 where it has none or null.

    Raises:
        ValueError: It is no finite number of at least 0.
    """
    value = row.get("weight")
    weight = 1.0 if value is None else read_weight(value)
    if weight is None:
        raise ValueError(
            f"column weight must be a finite number of at least 0, found {short(value)}; rename the column if it is "
            "another"
        )
    return weight


def _pair(row: Mapping[str, Any], prompt: Text, sides: tuple[Text, Text], used: frozenset[str]) -> Example:
    for column, side in zip(("chosen", "rejected"), sides, strict=True):
        _refuse_marks(column, side)
    chosen, rejected = (
        _reply(prompt, column, side) for column, side in zip(("chosen", "rejected"), sides, strict=True)
    )
    return Example(prompt=prompt, chosen=chosen, rejected=rejected, tools=read_tools(row), used=used)


def _sides(row: Mapping[str, Any]) -> tuple[Text, Text]:
    chosen, rejected = read_text("chosen", row["chosen"]), read_text("rejected", row["rejected"])
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise ValueError("columns chosen and rejected must both be strings or both be lists of messages")
    return chosen, rejected


def _from_preference(row: Mapping[str, Any], as_chat: bool) -> Example:
    sides = _sides(row)
    if isinstance(sides[0], list) and isinstance(sides[1], list) and sides[0][0]["role"] in ("user", "system"):
        # Some sets repeat the whole conversation in both columns beside the prompt: the conversation counts.
        example = _from_implicit(row, as_chat)
        question = read_prompt(row, True).text
        said = " ".join(str(message["content"]) for message in example.prompt or [] if isinstance(message, dict))
        for message in question if isinstance(question, list) else []:
            asked = message["content"].strip()
            if asked not in said and not any(
                m["content"].strip() in asked
                for m in example.prompt or []
                if isinstance(m, dict) and m["role"] == "user"
            ):
                raise ValueError(
                    f"the question {short(asked)} is not in the conversations of chosen and rejected; let these begin "
                    "with the reply, or rename the column of the question"
                )
        return example
    prompt = read_prompt(row, as_chat or isinstance(sides[0], list))
    return _pair(row, prompt.text, sides, prompt.used)


def _from_implicit(row: Mapping[str, Any], as_chat: bool) -> Example:
    chosen, rejected = _sides(row)
    used = frozenset({"prompt", "tools", "chosen", "rejected"})
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _common_prompt(chosen, rejected)
        if not chosen[:cut].strip():
            raise ValueError(
                "chosen and rejected share no beginning and there is no column prompt, so the prompt would be empty"
            )
        prompt: Text = [{"role": "user", "content": chosen[:cut]}] if as_chat else chosen[:cut]
        sides = (chosen[cut:].lstrip(), rejected[cut:].lstrip()) if as_chat else (chosen[cut:], rejected[cut:])
        return _pair(row, with_system(row, prompt), sides, used)
    chosen, rejected = cast(list[Message], chosen), cast(list[Message], rejected)
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise ValueError("chosen and rejected share no first message, so no prompt can be taken from them")
    return _pair(row, with_system(row, chosen[:shared]), (chosen[shared:], rejected[shared:]), used)


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
    completions, rewards = plain_list(row["completions"]), plain_list(row["rewards"])
    for column, value in (("completions", completions), ("rewards", rewards)):
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise ValueError(f"column {column} must be a list, found {type(value).__name__}")
    if len(completions) != len(rewards) or len(completions) < 2:
        raise ValueError(
            f"columns completions and rewards must have the same length of at least 2, found {len(completions)} "
            f"and {len(rewards)}"
        )
    scores = []
    for reward in map(scalar, rewards):
        if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not abs(reward) < math.inf:
            raise ValueError(f"column rewards must hold numbers, found {short(reward)}")
        if abs(reward) > 1e308:
            raise ValueError(f"column rewards holds a number that is too large: {short(reward)}")
        scores.append(float(reward))
    if max(scores) == min(scores):
        return None
    chosen, rejected = (
        read_text("completions", completions[scores.index(value)]) for value in (max(scores), min(scores))
    )
    prompt = read_prompt(row, as_chat or isinstance(chosen, list) or isinstance(rejected, list))
    return _pair(row, prompt.text, (chosen, rejected), prompt.used)


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
