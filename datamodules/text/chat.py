"""Conversations to token ids with a loss mask that is right or refused, never silently empty."""

from __future__ import annotations

from typing import Any

import numpy as np

from datamodules.rows.messages import Message
from datamodules.text.pieces import Pieces
from datamodules.text.rendering import Renderer, joined
from datamodules.text.spans import Span, SpanEncoder
from datamodules.text.templates import Frame, Stops, end_of_calls, find_frame, rewriting
from datamodules.text.together import Ids, Way
from datamodules.text.unseen import Unseen

# For base models: plain words as roles, calls of tools in tags, each reply ended by the tokenizer's own end-of-sequence
# token.
PLAIN_TEMPLATE = (
    "{% if tools %}Tools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Calls: <tool_call>{"name": ..., "arguments": {...}}</tool_call>\n{% endif %}'
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: "
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{% set called = call['function'] or call %}"
    "{{ '\n' if message['content'] or not loop.first else '' }}"
    "{{ '<tool_call>{\"name\": ' }}{{ called['name'] | tojson }}{{ ', \"arguments\": ' }}"
    "{{ called['arguments'] if called['arguments'] is string else called['arguments'] | tojson }}{{ '}</tool_call>' }}"
    "{% endfor %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


class Chat:
    """Applies a tokenizer's chat template and finds the tokens that the model must learn to write.

    Where the template has `{% generation %}` markers they say which tokens; else each assistant turn is the text
    between the conversation before it (with the generation prompt) and what ends a reply in the template's own
    rendering (`templates.Frame`). That needs every earlier rendering up to there to be a prefix of the later one, which
    is checked: a template that rewrites history is refused. In both cases no token lies across the place where a
    sampler starts to write, so the ids of a conversation begin with those of its prompt, and a turn's stop token is
    supervised, and appended to the last turn where the template writes none.

    A generation prompt that opens a thought, which the conversation then lacks: a reply that begins with that thought
    is learnt behind the generation prompt, any other behind its header as the conversation shows it. What a template
    does not show is refused where it was to be learnt, and else said once.

    What tokenises is given as a way (`together`), so that many rows are tokenised at once.

    Args:
        tokenizer: A `transformers` tokenizer with a chat template.

    Attributes:
        pieces: Gives the ids of the template's texts.

    Raises:
        ValueError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "the rows are conversations but the tokenizer has no chat_template; give chat_template='plain', a "
                "template or a file with one, or use plain prompt and completion columns"
            )
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer)
        self._stops = Stops(tokenizer)
        self._ends = set(self._stops.special)  # and the stop tokens that the template writes, special or not
        self._frames: dict[bool, Frame | None] = {}
        self._stop_ids: dict[bool, set[int]] = {}  # that end replies, by whether there are tools
        self._unseen = Unseen()
        self._spanned = SpanEncoder(tokenizer, self._ends)
        self.pieces = Pieces(tokenizer)

    def encode_prompt(self, messages: list[Message], tools: list[Any] | None = None) -> Way[np.ndarray]:
        """Prompt ids, int32 `[time]`, that end with a reply's header or with the last assistant message left open."""
        if messages[-1]["role"] == "assistant":
            text = self.renderer.left_open(messages, tools)
        else:
            text = self._before(messages, tools)
        self._check_shown(messages, [], text, tools)
        (ids,) = yield Ids((text,))
        return ids

    def encode(
        self, messages: list[Message], *, first: int = 0, last_only: bool = False, tools: list[Any] | None = None
    ) -> Way[tuple[np.ndarray, np.ndarray]]:
        """Token ids and loss mask of a conversation, up to its last supervised token.

        Args:
            messages: The conversation.
            first: Only assistant turns from this message on are supervised.
            last_only: Supervise the last assistant turn alone.
            tools: Tool descriptions for the template.

        Returns:
            ids: int32 `[time]`.
            mask: bool `[time]`, true on every supervised token, stop tokens included; where a reply has a weight,
                float32, with the reply's weight on these and 0 elsewhere.

        Raises:
            ValueError: No assistant turn to learn from, or the tokens of one cannot be told with certainty.
        """
        turns = self._turns(messages, first, last_only)
        ids, spans = yield from self._spanned.encode(*self._spans(messages, turns, tools))
        weights = [messages[turn].get("learn", True) for turn in turns]
        mask = np.zeros(len(ids), dtype=bool if all(weight is True for weight in weights) else np.float32)
        for span, weight in zip(spans, weights, strict=True):
            mask[span.start : span.end] = weight
        if not mask.any():
            raise ValueError("the chat template leaves no token of the reply to learn from")
        end = int(np.flatnonzero(mask)[-1]) + 1  # what follows the last target only costs time
        return ids[:end], mask[:end]

    def encode_completion(
        self, prompt: list[Message], completion: list[Message], tools: list[Any] | None = None
    ) -> Way[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Prompt and completion ids, int32 `[time]` each, and the completion's loss mask, bool `[time]`.

        The completion starts after the reply's header and ends with its stop token. The mask is true on what the
        assistant writes: replies with their stop tokens, and not the other messages between them.

        Raises:
            ValueError: The completion does not start with an assistant message, or its tokens cannot be told.
        """
        messages = [*prompt, *completion]
        turns = self._turns(messages, len(prompt), False)
        replies = [i for i in range(len(prompt), turns[-1] + 1) if messages[i]["role"] == "assistant"]
        if replies[0] != len(prompt):
            raise ValueError(f"a completion must start with an assistant message, found {completion[0]['role']!r}")
        text, spans = self._spans(messages, replies, tools)
        if spans[0].opening is None:
            text, spans = self._between_renderings(messages, replies, tools)  # says why it cannot be told
        ids, spans = yield from self._spanned.encode(text, spans)
        mask = np.zeros(len(ids), dtype=bool)
        for reply, span in zip(replies, spans, strict=True):
            mask[span.start : span.end] = reply in turns
        start, end = spans[0].opening, spans[-1].end
        return ids[:start], ids[start:end], mask[start:end]

    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a reply: the end-of-sequence token and the token that the template ends assistant turns with."""
        stops = set() if self.tokenizer.eos_token_id is None else {int(self.tokenizer.eos_token_id)}
        self._frame(None)
        return tuple(sorted(stops | self._stop_ids.get(False, set())))

    @staticmethod
    def _turns(messages: list[Message], first: int, last_only: bool) -> list[int]:
        turns = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
        learnt = [i for i in turns if messages[i].get("learn", True)]
        if turns and not learnt:
            raise ValueError("every assistant message of the conversation is marked as not to be learnt")
        turns = learnt
        if not turns:
            roles = [message["role"] for message in messages]
            raise ValueError(f"the conversation has no assistant message to learn from; its roles are {roles}")
        return turns[-1:] if last_only else turns

    def _spans(self, messages: list[Message], turns: list[int], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """The conversation up to its last turn as text, and the characters of each turn."""
        found = self._between_markers(messages, turns, tools)
        text, spans = self._between_renderings(messages, turns, tools) if found is None else found
        text, spans = self._with_thought(messages, turns[-1], text, spans, tools)
        self._check_shown(messages[: turns[-1] + 1], turns, text, tools)
        return text, spans

    def _frame(self, tools: list[Any] | None) -> Frame | None:
        """What the template writes around a reply; None where that cannot be learnt."""
        key = bool(tools)
        if key not in self._frames:

            def render(messages: list[dict[str, Any]], prompt: bool) -> str:
                return self.renderer.render(messages, tools=tools, prompt=prompt)

            self._frames[key] = frame = find_frame(render, self._stops)
            if frame is not None:
                found = [self._stops.last_id(text) for text in (frame.closing, frame.between)]
                found.append(end_of_calls(render, self._stops, frame))
                self._stop_ids[key] = {token for token in found if token is not None}
                self._ends.update(self._stop_ids[key])
        return self._frames[key]

    def _before(self, messages: list[Message], tools: list[Any] | None) -> str:
        """What a sampler is given to write the next reply."""
        text, frame = self.renderer.render(messages, tools=tools, prompt=True), self._frame(tools)
        if frame is None or not frame.header or text.endswith(frame.header):
            return text
        self._unseen.say(
            "header", f"the chat template ignores add_generation_prompt; prompts end with its header {frame.header!r}"
        )
        return text + frame.header

    def _check_shown(self, messages: list[Message], turns: list[int], text: str, tools: list[Any] | None) -> None:
        if tools and not self._unseen.tools_checked:
            self._unseen.check_tools(
                self.renderer.render(messages, tools=tools), lambda: self.renderer.render(messages)
            )
        self._unseen.check(messages, turns, text, lambda changed: self.renderer.render(changed, tools=tools))

    def _with_thought(
        self, messages: list[Message], turn: int, text: str, spans: list[Span], tools: list[Any] | None
    ) -> tuple[str, list[Span]]:
        """Puts back the thought that the generation prompt opens and the rendering of the last turn leaves out."""
        frame, content = self._frame(tools), messages[turn].get("content")
        if frame is None or not frame.opened.strip() or not isinstance(content, str):
            return text, spans
        mark, body = frame.opened.strip(), content.strip()
        before = self._before(messages[:turn], tools)
        head = before.removesuffix(frame.opened)
        answer = text[len(head) : spans[-1].end].removesuffix(frame.closing).strip()
        held = body.startswith(mark) and body.endswith(answer) and text.startswith(head)
        if not held or answer.startswith(mark):  # no thought, or it is shown
            return text, spans
        space = frame.opened[len(frame.opened.rstrip()) :]
        whole = before + body[len(mark) :].removeprefix(space) + frame.closing
        return whole, [*spans[:-1], Span(len(before), len(before), len(whole))]

    def _between_markers(
        self, messages: list[Message], turns: list[int], tools: list[Any] | None
    ) -> tuple[str, list[Span]] | None:
        messages = messages[: turns[-1] + 1]
        marked = self.renderer.marked(messages, tools)
        if marked is None:
            return None
        text, places = marked
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(places) != len(assistants):
            places = joined(places)
        if len(places) != len(assistants):
            return None  # a turn without a marker, or with several: the renderings decide, or refuse
        spans = []
        for turn, (start, end) in zip(assistants, places, strict=True):
            if turn in turns:
                if start == end and (messages[turn].get("content") or messages[turn].get("tool_calls")):
                    return None
                opening = self._opening(messages, turn, tools, text[:end])
                spans.append(Span(opening, start if opening is None else max(start, opening), end))
        end, closing, _ = self._reply_end(text, tools)
        return text[: max(spans[-1].end, end + len(closing))], spans

    def _opening(self, messages: list[Message], turn: int, tools: list[Any] | None, text: str) -> int | None:
        """Length of what a sampler is given to write turn `turn`, if `text` begins with it.

        Where the generation prompt opens a thought that `text` lacks, it is the length of all before that.
        """
        try:
            before = self._before(messages[:turn], tools)
        except ValueError:  # such as an assistant message that comes first
            return None
        if text.startswith(before):
            return len(before)
        frame = self._frame(tools)
        head = before.removesuffix(frame.opened) if frame is not None and frame.opened else before
        if head == before or not text.startswith(head):
            return None
        opened = before[len(head) :].rstrip()
        if opened and text.startswith(head + opened):
            return len(head + opened)
        self._unseen.say(
            "opened",
            f"the generation prompt ends with {before[len(head) :]!r}, which replies in a conversation lack; they are "
            "learnt behind their header alone (one that begins with it is learnt behind the whole generation prompt)",
        )
        return len(head)

    def _reply_end(self, text: str, tools: list[Any] | None) -> tuple[int, str, str]:
        """Where the last reply of a rendering ends, and what then closes it: as the last one, and as an earlier one."""
        frame = self._frame(tools)
        if frame is None or not text.endswith(frame.tail):
            return len(text), "", ""
        return len(text) - len(frame.tail), frame.closing, frame.between

    def _between_renderings(
        self, messages: list[Message], turns: list[int], tools: list[Any] | None
    ) -> tuple[str, list[Span]]:
        last = turns[-1]
        if turns[0] == 0:
            raise ValueError("the conversation starts with an assistant message; a user or system one must come first")
        whole = self.renderer.render(messages[: last + 1], tools=tools)
        spans = []
        for turn in turns:
            after = whole if turn == last else self.renderer.render(messages[: turn + 1], tools=tools)
            end, closing, between = self._reply_end(after, tools)
            reply = after[:end] + (closing if turn == last else between)
            opening = self._opening(messages, turn, tools, whole)
            if opening is None or opening > len(reply) or not whole.startswith(reply):
                raise rewriting(turn, last, self._before(messages[:turn], tools), whole)
            spans.append(Span(opening, opening, len(reply)))
        return whole[: spans[-1].end], spans
