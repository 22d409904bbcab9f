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
    """

    user: str
    answer: str


@dataclass
class Conversation:
    """A chat with one policy.

    Attributes:
        as_messages: Whether turns make one conversation in a chat template; else each continues a text of its own.
        system: The system prompt; empty: none.
        turns: What was said.
    """

    as_messages: bool
    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def prompt(self, user: str) -> str | list[Message]:
        """What the policy gets to answer or continue."""
        return [*self.messages(), {"role": "user", "content": user}] if self.as_messages else user

    def messages(self) -> list[Message]:
        """All turns as messages."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            found += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Rows that fine-tuning reads: one of messages, or one a text; none where nothing was said."""
        if not self.as_messages:
            return [{"prompt": turn.user, "completion": turn.answer} for turn in self.turns]
        return [{"messages": self.messages()}] if self.turns else []
