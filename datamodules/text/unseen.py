"""What a row holds and its chat template does not show: refused where it was to be learnt, else said once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

logger = logging.getLogger(__name__)

# Keys of a message that some templates show and others drop, beside its content and its calls.
_SPOKEN = ("reasoning_content", "reasoning", "thinking", "name")

Render = Callable[[list[dict[str, Any]]], str]


class Unseen:
    """Compares conversations with their renderings.

    What stands in the text as it is costs a search alone; where it does not, the conversation is rendered without it,
    and what changes nothing is not shown.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()
        self.tools_checked = False

    def check_tools(self, with_tools: str, without: Callable[[], str]) -> None:
        """Says once that the template does not show tools (looked at for the first conversation that has some)."""
        if self.tools_checked:
            return
        self.tools_checked = True
        try:
            unseen = with_tools == without()
        except ValueError:  # it needs them
            unseen = False
        if unseen:
            self.say("tools", "the chat template does not render tools: the model will not see them")

    def check(self, messages: list[dict[str, Any]], turns: Sequence[int], text: str, render: Render) -> None:
        """Checks every message of a conversation.

        Args:
            messages: The conversation, up to its last message that is rendered.
            turns: The assistant messages to be learnt.
            text: Its rendering, or the part that is learnt from.
            render: Renders other messages in the same way.

        Raises:
            ValueError: The calls or the content of an assistant message to be learnt do not show.
        """
        whole: list[str] = []

        def shown(number: int, changed: list[dict[str, Any]]) -> bool:
            if not whole:
                whole.append(render(messages))
            try:
                return render([*messages[:number], *changed, *messages[number + 1 :]]) != whole[0]
            except ValueError:  # it is needed
                return True

        for number, message in enumerate(messages):
            role, content = message["role"], message.get("content")
            plain = content.strip() if isinstance(content, str) else ""
            if plain and plain not in text:
                without = [] if role == "system" else [message | {"content": ""}]
                if not shown(number, without):
                    what = f"the content of message {number} (role {role!r}), {_short(content)}"
                    self._unseen(what, f"messages of the role {role!r}", number in turns)
                elif role == "assistant":
                    self._check_thought(plain, text)
            if message.get("tool_calls"):
                rest = {key: value for key, value in message.items() if key != "tool_calls"}
                if not shown(number, [rest]):
                    what = f"tool_calls of message {number}, {_short(message['tool_calls'])}"
                    self._unseen(what, "tool_calls", number in turns)
            for key in _SPOKEN:
                value = message.get(key)
                if not value or (isinstance(value, str) and value.strip() in text):
                    continue
                if not shown(number, [{name: item for name, item in message.items() if name != key}]):
                    self.say(
                        f"{role} {key}", f"the chat template does not render {key!r} of messages with role {role!r}"
                    )

    def _check_thought(self, content: str, text: str) -> None:
        thought, mark, _ = content.partition("</think>")
        thought = thought.removeprefix("<think>").strip()
        if mark and thought and thought not in text:
            self.say("thoughts", "the chat template leaves out the thoughts (<think>...</think>) of earlier replies")

    def _unseen(self, what: str, kind: str, learnt: bool) -> None:
        if learnt:
            raise ValueError(
                f"the chat template does not render {what}, so they cannot be learnt; use a template that does "
                "(chat_template=...), or take them out of the row"
            )
        self.say(kind, f"the chat template does not render {what}; nor others of its kind: the model will not see them")

    @rank_zero_only
    def say(self, kind: str, message: str) -> None:
        """Warns once of each kind."""
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s", message)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text if len(text) <= 60 else text[:57] + "...")
