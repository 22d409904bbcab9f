"""An episode as token ids: its prompt, what stands between two turns of the policy, and what a turn says."""

from __future__ import annotations

import json
from collections.abc import Sequence

from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.environments.parsing import Parsed, ToolFormat
from alignment_modules.rollouts.environments.plain_text import PlainText
from alignment_modules.rollouts.environments.results import Result, cut
from alignment_modules.rollouts.environments.templates import Message, Schemas, Template, Turn, call_id, name_of


class TurnRenderer:
    """Renders turns once, as ids: what a policy wrote is neither decoded nor tokenised again.

    What stands between two turns is what the chat template writes there: it renders a made-up question and turn with
    the results behind it, and what follows the end of that turn is tokenised by itself. Control tokens in it are the
    template's own: what a tool said is text, whatever it spells.

    Args:
        codec: The tokenizer and its stop tokens.
        tool_format: How calls are written.
        max_result_length: Longest result, in tokens; what is longer is cut, and a note says so.

    Raises:
        ValueError: If there is no tokenizer, or it has no chat template.
    """

    def __init__(self, codec: Codec, tool_format: ToolFormat, *, max_result_length: int = 1024) -> None:
        self.codec, self.tool_format, self.max_result_length = codec, tool_format, max_result_length
        self._template = Template(codec.require_tokenizer())
        self._plain = PlainText(codec.tokenizer)
        self._turns: dict[tuple[tuple[str, ...], tuple[int, ...], str], Turn] = {}

    def check(self, schemas: Schemas) -> None:
        """Refuses, before anything is generated, a chat template that episodes cannot be written with.

        The token with which the template ends turns with calls becomes one of the codec's stop tokens.

        Args:
            schemas: Of an environment's tools.

        Raises:
            ValueError: If the template shows no tools, calls or results, or rewrites history.
        """
        if not schemas:
            return
        stops = {self._turn([name_of(schemas[0])] * count, schemas).stop for count in (1, 2)} - {""}
        self._template.check(schemas)
        new = {int(self.codec.tokenizer.convert_tokens_to_ids(stop)) for stop in stops} - {*self.codec.stop_token_ids}
        self.codec.data_stops = (*self.codec.data_stops, *sorted(new))

    def prompt(self, messages: Sequence[Message], schemas: Schemas, told: str = "") -> list[int]:
        """Ids of the messages before the policy's first turn, with the tools and the turn's header.

        Args:
            messages: The messages.
            schemas: Of the episode's tools.
            told: What the last message of the user ends with and an environment said: it stays text.

        Returns:
            The ids.

        Raises:
            ValueError: If the template refuses them.
        """
        text = self._template.text(messages, schemas)
        mark = self._plain.mark(text)
        guarded = self._plain.guarded(told, mark)
        if guarded != told:
            last = max(number for number, message in enumerate(messages) if message["role"] == "user")
            content = messages[last]["content"].removesuffix(told) + guarded
            text = self._template.text(
                [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]], schemas
            )
        return self._plain.ids(text, mark, None)

    def appended(
        self,
        results: Sequence[Result],
        *,
        stopped: bool,
        schemas: Schemas,
        calls: Sequence[Message | None] = (),
    ) -> list[int]:
        """Ids between the end of what the policy wrote and the start of its next turn.

        Args:
            results: What its calls were answered with, in their order; at least one.
            stopped: Whether the policy wrote the token that ends a turn; else it is appended, too.
            schemas: Of the episode's tools.
            calls: The `tool_calls` of `message` that were answered, None for one that could not be read; for templates
                that write a tool's name beside its result.

        Returns:
            The ids.

        Raises:
            ValueError: If the template refuses them.
        """
        known = [name_of(schema) for schema in schemas] or ["tool"]
        called = [call["function"]["name"] if call else "" for call in calls] or [""] * len(results)
        turn = self._turn([name if name in known else known[0] for name in called], schemas)
        mark = self._plain.mark(*(result.text for result in results))
        texts = [self._guarded(result.text, mark) for result in results]
        text = self._template.text([*turn.messages, *turn.answers(texts)], schemas)
        end = text.index(turn.last) + len(turn.last) + turn.end
        if stopped:
            return self._plain.ids(text[end + len(turn.stop) :], mark, turn.stop)
        return self._plain.ids(text[end:], mark)

    def read(self, ids: Sequence[int]) -> Parsed:
        """The calls of a turn, and what it says beside them.

        Args:
            ids: What the policy wrote, with or without its stop token.
        """
        return self.tool_format.parse(self.codec.decode([list(ids)])[0])

    def message(self, parsed: Parsed, *, first: int = 0) -> Message:
        """A turn as chat templates read it.

        Args:
            parsed: As `read` gives it.
            first: Calls of the episode before it, which its calls are numbered behind.
        """
        message: Message = {"role": "assistant", "content": parsed.content}
        if parsed.calls:
            message["tool_calls"] = [
                {"id": call_id(number), "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
                for number, one in enumerate(parsed.calls, first)
            ]
        return message

    def answer(self, result: Result, call: Message | None = None) -> Message:
        """A result as chat templates read it.

        Args:
            result: What the call was answered with.
            call: One of the `tool_calls` of `message`; None: it could not be read.
        """
        named = {} if call is None else {"name": call["function"]["name"], "tool_call_id": call["id"]}
        return {"role": "tool", **named, "content": result.text}

    def _turn(self, names: Sequence[str], schemas: Schemas) -> Turn:
        key = tuple(names), self.codec.stop_token_ids, json.dumps(schemas, sort_keys=True, default=str)
        if key not in self._turns:
            self._turns[key] = self._template.turn(names, schemas, self._ends)
        return self._turns[key]

    def _ends(self, written: str, between: str) -> tuple[int, str] | None:
        """Where a turn ends: at a stop token, else at the first control token behind a whole call."""
        stops = [self.codec.tokenizer.decode([stop], skip_special_tokens=False) for stop in self.codec.stop_token_ids]
        if found := [(between.index(stop), -len(stop), stop) for stop in stops if stop and stop in between]:
            return min(found)[0], min(found)[2]
        for place, token in self._plain.control_tokens(between):
            parsed = self.tool_format.parse(written + between[:place])
            if parsed.calls and not parsed.errors:
                return place, token
        return None

    def _guarded(self, text: str, mark: str) -> str:
        """A result with marks where it spells control tokens, and cut where it is too long."""
        fits = self._plain.length_that_fits(text, self.max_result_length)
        return self._plain.guarded(text[:fits], mark) + cut(text, fits)[fits:]
