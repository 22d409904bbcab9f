"""What a chat template writes around a reply: learnt from its own renderings of made-up messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from datamodules.rows.messages import Arguments

_ASK, _REPLY, _NEXT = "qzaskzq", "qzreplyzq", "qznextzq"  # words that no template holds
_NEVER = ("unk_token", "bos_token", "pad_token", "mask_token", "cls_token")


class Frame(NamedTuple):
    """The text around a reply.

    Attributes:
        header: Written before each reply though the generation prompt does not write it (templates that ignore
            `add_generation_prompt`); empty elsewhere.
        opened: What the generation prompt writes beyond a reply's header, such as the start of a thought; empty where
            conversations hold the generation prompt as it is.
        tail: All that follows a reply which ends the conversation.
        closing: The part of `tail` that ends the reply: up to its first stop token, if it has one.
        between: What ends a reply that another message follows.
    """

    header: str
    opened: str
    tail: str
    closing: str
    between: str


class Stops:
    """The tokens of a tokenizer that may end a turn: its special and its added ones.

    White space never does, nor do tokens for unknown, first, masked and padded places, unless they double as the
    end-of-sequence token.

    Args:
        tokenizer: A `transformers` tokenizer.

    Attributes:
        special: Ids of those that are marked special.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = {int(index): token for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        never = {getattr(tokenizer, name, None) for name in _NEVER} - {tokenizer.eos_token}
        self.special = {int(index) for index in tokenizer.all_special_ids}
        self.special |= {index for index, token in added.items() if getattr(token, "special", False)}
        self.special -= {tokenizer.convert_tokens_to_ids(name) for name in never if name}
        texts = {str(token) for token in added.values()} | set(tokenizer.all_special_tokens)
        found = sorted((t for t in texts - never if t.strip()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, found))) if found else None

    def until_first(self, text: str) -> str | None:
        """The text up to its first stop token and with it, or None."""
        match = self._pattern.search(text) if self._pattern else None
        return text[: match.end()] if match else None

    def last_id(self, text: str) -> int | None:
        """Id of the stop token that a text ends with, or None."""
        whole = self.tokens(text)
        return int(self._tokenizer.convert_tokens_to_ids(whole[-1])) if whole and text.endswith(whole[-1]) else None

    def tokens(self, text: str) -> list[str]:
        """The stop tokens in a text."""
        return [match.group() for match in self._pattern.finditer(text)] if self._pattern else []

    def shared(self, first: str, second: str) -> str:
        """The common beginning of two texts, with no stop token cut in two."""
        common = first[: common_length(first, second)]
        if self._pattern is None:
            return common
        for text in (first, second):
            for match in self._pattern.finditer(text):
                if match.start() < len(common) < match.end():
                    common = common[: match.start()]
        return common


def find_frame(render: Callable[[list[dict[str, Any]], bool], str], stops: Stops) -> Frame | None:
    """Learn what a template writes around replies.

    Args:
        render: Renders messages, with the generation prompt or without.
        stops: The tokens that may end a turn.

    Returns:
        The frame, or None where the template refuses a plain question and answer, or shows them otherwise.
    """
    ask, reply, more = (
        {"role": role, "content": text} for role, text in (("user", _ASK), ("assistant", _REPLY), ("user", _NEXT))
    )
    try:
        prompted, single = render([ask], True), render([ask, reply], False)
        asked = render([ask], False)
    except ValueError:
        return None
    place, question = single.find(_REPLY), prompted.find(_ASK)
    if place < 0 or question < 0:
        return None
    tail, following = single[place + len(_REPLY) :], None
    try:
        double = render([ask, reply, more], False)
        if _REPLY in double and _NEXT in double:
            following = double[double.find(_REPLY) + len(_REPLY) : double.find(_NEXT)]
    except ValueError:
        pass
    ignored = prompted == asked  # or written always
    lead = single[:place]
    header = opened = ""
    if lead.startswith(prompted):
        header = lead[len(prompted) :] if ignored and lead[len(prompted) :].strip() else ""
    else:
        common = stops.shared(lead, prompted)
        opened = prompted[len(common) :] if len(common) >= question + len(_ASK) else ""
    both = tail if following is None else stops.shared(tail, following)
    # A template that writes the next reply's header always does so behind a reply as behind a question.
    always = ignored and prompted[question + len(_ASK) :].endswith(tail[len(both) :])
    closing = stops.until_first(both if always else tail)
    closing = both if closing is None else closing
    between = closing
    if following is not None and not following.startswith(closing):
        # The last reply ends otherwise than the earlier ones, which then end as a user's message does.
        user = stops.until_first(asked[asked.find(_ASK) + len(_ASK) :]) if prompted.startswith(asked) else None
        between = user if user and not ignored and following.startswith(user) else both
    return Frame(header, opened, tail, closing, between)


def end_of_calls(render: Callable[[list[dict[str, Any]], bool], str], stops: Stops, frame: Frame) -> int | None:
    """Id of the token that ends a reply which calls tools, where it is another than what ends plain ones; else None.

    Args:
        render: Renders messages, with the generation prompt or without.
        stops: The tokens that may end a turn.
        frame: What stands around a plain reply.
    """
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": Arguments({"q": _REPLY})}}
    reply = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        text = render([{"role": "user", "content": _ASK}, reply], False)
    except ValueError:
        return None
    _, shown, tail = text.rpartition(_REPLY)
    if not shown or tail.endswith(frame.tail):
        return None
    ends, plain = stops.tokens(tail), stops.tokens(frame.tail)
    while ends and plain and ends[-1] == plain[-1]:  # such as the next header, which some always write
        ends, plain = ends[:-1], plain[:-1]
    return stops.last_id(ends[-1]) if ends and plain else None


def common_length(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def rewriting(turn: int, last: int, before: str, whole: str) -> ValueError:
    """Why the tokens of a reply cannot be told, and what helps.

    Args:
        turn: The message that is the reply.
        last: The last message that is to be learnt.
        before: What a sampler is given to write the reply.
        whole: The rendering of the conversation.
    """
    if turn != last:
        return ValueError(
            f"the chat template rewrites history: the conversation up to message {turn} is not the beginning of the "
            "whole one, so the tokens of that reply cannot be told. Supervise the last turn alone "
            "(loss_on='last_turn'; in a preference pair let the prompt hold the earlier turns), or use a template with "
            "{% generation %} markers"
        )
    same = common_length(before, whole)
    return ValueError(
        f"the tokens of message {turn} cannot be told: the generation prompt writes {before[same:][:60]!r} where the "
        f"conversation with that reply has {whole[same:][:60]!r}, which is more than a reply's header. Use a template "
        "whose conversations hold the generation prompt as it is (chat_template=...), or for demonstrations one with "
        "{% generation %} markers"
    )
