"""What was said in a chat so far, as prompts for a policy and as rows to train on."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass
class Turn:
    """A message of the user, and what the policy wrote to it.

    Attributes:
        user: The message; where text is continued, the prompt.
        answer: What was written.
        messages: What followed the message where that is more than an answer: calls and their results, too.
        added: What an environment added to the message.
    """

    user: str
    answer: str
    messages: list[Message] = field(default_factory=list)
    added: str = ""


@dataclass
class Conversation:
    """A chat with one policy.

    Attributes:
        as_messages: Whether turns make one conversation in a chat template; else each continues a text of its own.
        system: The system prompt; empty: none.
        turns: What was said.
        tools: Schemas of what may be called.
    """

    as_messages: bool
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)

    def prompt(self, user: str) -> str | list[Message]:
        """What the policy gets to answer or continue."""
        return [*self.messages(), {"role": "user", "content": user}] if self.as_messages else user

    def messages(self) -> list[Message]:
        """All turns as messages."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            followed = turn.messages or [{"role": "assistant", "content": turn.answer}]
            found += [{"role": "user", "content": with_added(turn.user, turn.added)}, *followed]
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Rows that fine-tuning reads: one of messages, or one a text; none where nothing was said."""
        if not self.as_messages:
            return [{"prompt": turn.user, "completion": turn.answer} for turn in self.turns]
        more = {"tools": self.tools} if self.tools else {}
        return [{"messages": self.messages(), **more}] if self.turns else []


def with_added(user: str, added: str) -> str:
    """A message with what an environment added to it, on a line of its own."""
    return "\n".join(filter(None, (user, added)))
