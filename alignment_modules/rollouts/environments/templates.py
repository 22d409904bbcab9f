"""What a chat template writes behind a turn that calls tools, and whether an episode can be written by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignment_modules.functional.http import short

_ASK, _WORDS, _THOUGHT = "qzaskzq", "qzwordszq", "qzthoughtzq"  # words that no template holds
_THINK, _END_OF_THOUGHT = "<think>", "</think>"
_OTHER = "; give another chat template (the data module's chat_template='plain' shows tools, or one of your own)"

Message = dict[str, Any]
Schemas = Sequence[dict[str, Any]]
Ends = Callable[[str, str], tuple[int, str] | None]
"""From what a turn writes up to its last argument, and what stands between that and the results: how many characters of
the latter the policy writes, and the token that then ends the turn; None: there is no such token."""


@dataclass(frozen=True)
class Turn:
    """A made-up question and a turn that calls tools, as a template takes them.

    Attributes:
        messages: Both.
        names: Of the tools, one for each result.
        last: A word in the last argument, which the turn writes nowhere else.
        end: Characters between that word and the end of what the policy writes.
        stop: The control token that then ends the turn; empty: there is none.
    """

    messages: tuple[Message, ...]
    names: tuple[str, ...]
    last: str
    end: int = 0
    stop: str = ""

    def answers(self, texts: Sequence[str]) -> list[Message]:
        """Messages of results, for its calls in their order."""
        ids = [call["id"] for call in self.messages[1]["tool_calls"]]
        return [
            {"role": "tool", "name": name, "tool_call_id": ids[min(number, len(ids) - 1)], "content": text}
            for number, (name, text) in enumerate(zip(self.names, texts, strict=True))
        ]


class Template:
    """A tokenizer's chat template.

    Args:
        tokenizer: As in transformers.

    Raises:
        ValueError: If it has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "environments and tools need a tokenizer with a chat template, and this one has none; give one "
                "(the data module's chat_template='plain', a file, or the template itself)"
            )
        self._tokenizer = tokenizer

    def text(self, messages: Sequence[Message], schemas: Schemas, *, prompt: bool = True) -> str:
        """A conversation as text, with the header of the policy's next turn at its end if `prompt`.

        Raises:
            ValueError: If the template refuses it.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tools=list(schemas) or None, tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as error:  # a template is a program of its own
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(f"the chat template refuses a conversation of {roles}: {error}{_OTHER}") from error

    def turn(self, names: Sequence[str], schemas: Schemas, ends: Ends) -> Turn:
        """A turn that is answered with results, and where in a rendering it ends.

        Args:
            names: Of the tools that are called, one for each result.
            schemas: Of the tools.
            ends: Finds the token that ends a turn, see `Ends`.

        Raises:
            ValueError: If the template cannot show such a turn, or not where it ends.
        """
        failure: ValueError | None = None
        results = [_result_word(number) for number in range(len(names))]
        for calls in dict.fromkeys((len(names), 1)):  # some take no more than one call a turn
            for as_text in (False, True):  # templates differ in how they take arguments
                turn = replace(_called(names[:calls], as_text), names=tuple(names))
                try:
                    text = self.text([*turn.messages, *turn.answers(results)], schemas)
                except ValueError as error:
                    failure = failure or error
                    continue
                if turn.last not in text or any(word not in text for word in results):
                    missing = "calls of tools" if turn.last not in text else "the results of tools (role 'tool')"
                    failure = ValueError(f"the chat template does not show {missing}{_OTHER}")
                    continue
                return self._with_end(turn, text, results, schemas, ends)
        raise failure or ValueError("the chat template shows no calls of tools")

    def _with_end(self, turn: Turn, text: str, results: list[str], schemas: Schemas, ends: Ends) -> Turn:
        prompt = self.text(turn.messages[:1], schemas)
        place = text.index(turn.last) + len(turn.last)
        written, between = text[len(prompt) : place], text[place : text.index(results[0], place)]
        if (found := ends(written, between)) is not None:
            return replace(turn, end=found[0], stop=found[1])
        # No token ends it; what stands between words and a result does.
        spoken = [turn.messages[0], {"role": "assistant", "content": _WORDS}, *turn.answers(results)[:1]]
        _, shown, behind = self.text(spoken, schemas).partition(_WORDS)
        closing = behind[: behind.find(results[0])]
        if not shown or not closing or not between.endswith(closing):
            raise ValueError(
                f"it cannot be told where the chat template ends a turn with calls: it writes {short(between)} between "
                f"an argument and the result, and none of the stop tokens{_OTHER}"
            )
        return replace(turn, end=len(between) - len(closing))

    def check(self, schemas: Schemas) -> None:
        """Whether an episode's tokens can be appended one after the other and are still what the template writes.

        Raises:
            ValueError: If the template does not show the tools, or writes a turn otherwise once others follow.
        """
        ask = [{"role": "user", "content": _ASK}]
        prompt = self.text(ask, schemas)
        if prompt == self._without_tools(ask):
            raise ValueError(f"the chat template does not show the tools, so the policy would not see them{_OTHER}")
        self._check_header(ask, prompt, schemas)
        opened = _opens_thought(prompt[prompt.rfind(_ASK) :])
        if not opened:
            self._check_kept("", schemas, prompt)
        if opened or _END_OF_THOUGHT in self._source(schemas):
            self._check_kept(_THOUGHT, schemas, prompt)

    def _check_header(self, ask: list[Message], prompt: str, schemas: Schemas) -> None:
        if prompt != self.text(ask, schemas, prompt=False):
            return
        answered = self.text([*ask, {"role": "assistant", "content": _WORDS}], schemas, prompt=False)
        header = answered[len(prompt) :].partition(_WORDS)[0]
        if answered.startswith(prompt) and header.strip():
            raise ValueError(
                f"the chat template ignores add_generation_prompt, so that no turn of the policy gets its header, "
                f"{header!r}{_OTHER}"
            )

    def _without_tools(self, messages: Sequence[Message]) -> str | None:
        try:
            return self.text(messages, [])
        except ValueError:  # it needs them
            return None

    def _check_kept(self, thought: str, schemas: Schemas, prompt: str) -> None:
        """Whether a turn stands, behind what it was written to, as it is before results and another turn."""
        turn = self._shown(schemas, f"{_THINK}\n{thought}\n{_END_OF_THOUGHT}\n\n" if thought else "")
        once = [*turn.messages, *turn.answers([_result_word(0)])]
        first = self.text(once, schemas)
        second = self.text([*once, turn.messages[1], *turn.answers([_result_word(1)])], schemas)
        if thought not in first:
            how = "it takes the policy's thoughts (<think>...</think>) out of turns that call tools"
        elif not first.startswith(prompt):
            how = f"behind a question it writes {_difference(prompt, first)} once the turn with calls stands there"
        elif not second.startswith(first):
            how = f"up to the second turn it writes {_difference(first, second)} once that stands there"
        else:
            return
        raise ValueError(
            f"the chat template rewrites history: {how}, so a policy would be trained on contexts that the template "
            "never writes. Use a template that keeps them (the data module's chat_template='plain', or one of your "
            "own, such as this one without the part that does so)"
        )

    def _shown(self, schemas: Schemas, content: str) -> Turn:
        failure: ValueError | None = None
        for as_text in (False, True):
            turn = _called([name_of(schemas[0])], as_text, content)
            try:
                self.text([*turn.messages, *turn.answers([_ASK])], schemas)
            except ValueError as error:
                failure = failure or error
            else:
                return turn
        raise failure or ValueError("the chat template shows no calls of tools")

    def _source(self, schemas: Schemas) -> str:
        given = self._tokenizer.chat_template
        if isinstance(given, dict):
            given = self._tokenizer.get_chat_template(tools=list(schemas) or None)
        return str(given)


def call_id(number: int) -> str:
    """What names a call, in the nine letters and digits that some templates ask for."""
    return f"call{number:05d}"


def name_of(schema: Mapping[str, Any]) -> str:
    """The name of a tool."""
    return str(schema["function"]["name"])


def _result_word(number: int) -> str:
    return f"qzresult{number}zq"


def _called(names: Sequence[str], as_text: bool, content: str = "") -> Turn:
    words = [f"qzargument{number}zq" for number in range(len(names))]
    calls = []
    for number, (name, word) in enumerate(zip(names, words, strict=True)):
        arguments = json.dumps({"value": word}) if as_text else {"value": word}
        function = {"name": name, "arguments": arguments}
        calls.append({"id": call_id(number), "type": "function", "function": function})
    turn = {"role": "assistant", "content": content, "tool_calls": calls}
    return Turn(({"role": "user", "content": _ASK}, turn), tuple(names), words[-1])


def _difference(before: str, after: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    return f"{short(after[same : same + 40])} instead of {short(before[same : same + 40])}"


def _opens_thought(text: str) -> bool:
    return text.rfind(_THINK) > text.rfind(_END_OF_THOUGHT)
