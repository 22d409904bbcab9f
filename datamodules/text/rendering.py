"""Conversations as text, as a tokenizer's chat template writes them."""

from __future__ import annotations

import re
from typing import Any

from datamodules.rows.messages import Message, shown

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Renderer:
    """Renders conversations; a template's own errors come as ValueError with the roles that it refused.

    Args:
        tokenizer: A `transformers` tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def render(self, messages: list[Message], *, tools: list[Any] | None = None, prompt: bool = False) -> str:
        """The conversation as text, with the header of a reply at its end if `prompt`.

        Raises:
            ValueError: The template refuses the conversation.
        """
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
        template = self.tokenizer.get_chat_template(tools=tools) if tools else self.tokenizer.get_chat_template()
        if not _MARKER.search(template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, marked = render_jinja_template(
                conversations=[shown(messages)],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # templates raise what they like
            raise _refusal(messages, error) from error
        return rendered[0], marked[0]

    def _apply(self, messages: list[Message], tools: list[Any] | None, **options: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(shown(messages), tools=tools, tokenize=False, **options))
        except Exception as error:  # templates raise what they like
            raise _refusal(messages, error) from error


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
