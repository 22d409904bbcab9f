"""Conversations as text, as a tokenizer's chat template writes them."""

from __future__ import annotations

import operator
import re
from functools import cache
from typing import Any

from datamodules.rows.messages import Message, shown

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Renderer:
    """Renders conversations; a template's own errors come as ValueError with the roles that it refused.

    Args:
        tokenizer: A `transformers` tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        from transformers import PreTrainedTokenizerBase

        self.tokenizer = tokenizer
        own = getattr(type(tokenizer), "apply_chat_template", None)
        # The method's own way to a text, less what messages in canonical form have no need of.
        self._direct = own is PreTrainedTokenizerBase.apply_chat_template
        self._tokens = dict(tokenizer.special_tokens_map)
        self._prompts: tuple[list[Message], list[Any] | None, str] | None = None

    def render(self, messages: list[Message], *, tools: list[Any] | None = None, prompt: bool = False) -> str:
        """The conversation as text, with the header of a reply at its end if `prompt`.

        Raises:
            ValueError: The template refuses the conversation.
        """
        if not prompt:
            return self._rendered(messages, tools, False)
        if self._prompts is None or not _same(messages, self._prompts[0]) or tools is not self._prompts[1]:
            self._prompts = messages, tools, self._rendered(messages, tools, True)
        return self._prompts[2]

    def _rendered(self, messages: list[Message], tools: list[Any] | None, prompt: bool) -> str:
        if self._direct and messages:
            return self._jinja(messages, tools, add_generation_prompt=prompt)[0]
        return self._apply(messages, tools, add_generation_prompt=prompt, continue_final_message=False)

    def left_open(self, messages: list[Message], tools: list[Any] | None) -> str:
        """The conversation as text, with its last message not ended.

        Raises:
            ValueError: The template refuses the conversation.
        """
        return self._apply(messages, tools, continue_final_message=True)

    def marked(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[tuple[int, int]]] | None:
        """The conversation as text and the characters between `{% generation %}` markers; None without markers.

        Raises:
            ValueError: The template refuses the conversation.
        """
        if not _has_markers(self._template(tools)):
            return None
        return self._jinja(messages, tools, return_assistant_tokens_mask=True)

    def _template(self, tools: list[Any] | None) -> str:
        return str(self.tokenizer.get_chat_template(tools=tools) if tools else self.tokenizer.get_chat_template())

    def _jinja(
        self, messages: list[Message], tools: list[Any] | None, **options: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, marked = render_jinja_template(
                conversations=[shown(messages)],
                tools=tools,
                chat_template=self._template(tools),
                **options,
                **self._tokens,
            )
        except Exception as error:  # templates raise what they like
            raise _refusal(messages, error) from error
        return rendered[0], marked[0] if marked else []

    def _apply(self, messages: list[Message], tools: list[Any] | None, **options: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(shown(messages), tools=tools, tokenize=False, **options))
        except Exception as error:  # templates raise what they like
            raise _refusal(messages, error) from error


@cache
def _has_markers(template: str) -> bool:
    return _MARKER.search(template) is not None


def _same(messages: list[Message], others: list[Message]) -> bool:
    """Whether two conversations are made of the very same messages."""
    return len(messages) == len(others) and all(map(operator.is_, messages, others))


def joined(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Places in a text, with those that touch each other as one."""
    found: list[tuple[int, int]] = []
    for start, end in places:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def _refusal(messages: list[Message], error: Exception) -> ValueError:
    roles = [message["role"] for message in messages]
    return ValueError(f"the chat template refuses a conversation with the roles {roles}: {error}")
