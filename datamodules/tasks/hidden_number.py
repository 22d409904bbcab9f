"""A number is hidden in a range, and questions narrow it down: an environment, and how its conversations are written.

A policy that asks well halves what is left with every question. No single turn can know the number.
"""

from __future__ import annotations

import re
from typing import Any

from datamodules.ranges import NonNegative, check_options
from datamodules.tasks.characters import character_tokenizer

CHARACTERS = "0123456789-?>=ask"
ROLES = ("<user>", "<assistant>", "<tool>")
# Names of the tools alone, and a call of the only one as "?33": the shorter an episode, the sooner it is learnt.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for tool in tools or [] %}<tool>{{ tool['function']['name'] }}{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<assistant>{% generation %}{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}?{{ call['function']['arguments'].values() | join(',') }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'tool' %}<tool>{{ message['content'] }}"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_QUESTION = re.compile(r"\?(\d{1,9})")


class HiddenNumber:
    """An environment: `ask` compares the hidden number with another, and every question has its price.

    What is answered in the end is for a reward to judge, such as `ExactMatch`; `get_reward` takes what was asked.

    Args:
        price: Taken from the reward for each question, 0 or more.

    Examples:
        >>> hidden = HiddenNumber(price=0.01)
        >>> hidden.reset(low=17, high=48, number=29)
        >>> hidden.ask(33), hidden.ask(24), hidden.ask(90), hidden.get_reward()
        ('17-33', '25-33', '25-33', -0.03)
    """

    def __init__(self, price: NonNegative = 0.05) -> None:
        check_options(HiddenNumber.__init__, locals())
        self.price = price

    def reset(self, low: int, high: int, number: int) -> None:
        """Hides a number.

        Args:
            low: Where its range starts.
            high: Where it ends, included.
            number: The number.
        """
        self.low, self.high, self.number, self.questions = low, high, number, 0

    def ask(self, number: int) -> str:
        """Tells where the hidden number is, now that it was compared with a number: up to that, or above.

        Args:
            number: The number that it is compared with.
        """
        self.questions += 1
        self.low, self.high = narrowed(self.low, self.high, number, self.number)
        return written(self.low, self.high)

    def get_reward(self) -> float:
        """What the questions cost."""
        return -self.price * self.questions


def narrowed(low: int, high: int, asked: int, number: int) -> tuple[int, int]:
    """What is left of a range, now that it is known whether a number of it is above another, `asked`."""
    return (max(low, asked + 1), high) if number > asked else (low, min(high, asked))


def written(low: int, high: int) -> str:
    """A range as text.

    >>> written(17, 48)
    '17-48'
    """
    return f"{low}-{high}"


def read_questions(text: str) -> list[dict[str, Any]]:
    """The calls in a turn, for `tool_options.format`: a question is written "?33".

    Args:
        text: Of one turn.

    Returns:
        A call of `ask`, or none where the text holds no question mark.

    Raises:
        ValueError: If there is a question mark and anything but one question.

    Examples:
        >>> read_questions("?33"), read_questions("29")
        ([{'name': 'ask', 'arguments': {'number': 33}}], [])
    """
    if "?" not in text:
        return []
    found = _QUESTION.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:20]!r} is no question such as ?33")
    return [{"name": "ask", "arguments": {"number": int(found[1])}}]


def question_tokenizer() -> Any:
    """The tokenizer of these conversations, a token a character, whose chat template writes tools and their calls."""
    return character_tokenizer(CHARACTERS, roles=ROLES, chat_template=CHAT_TEMPLATE)
