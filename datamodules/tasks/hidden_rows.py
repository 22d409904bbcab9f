"""Searches for hidden numbers as a set of data: notes of careless players, their conversations, and prompts."""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

from torch.utils.data import Dataset

from datamodules.ranges import Count, Seed, Share, check_options
from datamodules.tasks.hidden_number import HiddenNumber, question_tokenizer, written
from datamodules.tasks.problems import Split
from datamodules.tasks.searches import Question, Search, Width, draw_searches, play_all


class HiddenNumberTask(Dataset[dict[str, Any]]):
    """Base of the three data sets: searches of one split.

    Args:
        split: "train", "validation" or "test"; no range with its number is in two of them, whatever the seeds.
        size: Number of rows.
        seed: Seed of the draw.
        width: Most numbers in a range; there are more than half as many.
        distinct: Whether each search comes at most once.
    """

    def __init__(self, *, split: Split, size: Count, seed: Seed, width: Width, distinct: bool) -> None:
        self.searches = draw_searches(split=split, size=size, seed=seed, width=width, distinct=distinct)

    @cached_property
    def tokenizer(self) -> Any:
        """One token a character, with a chat template that writes tools and their calls."""
        return question_tokenizer()

    def __len__(self) -> int:
        return len(self.searches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index={index} is outside {len(self)} rows")
        return self.row(index)

    def row(self, index: int) -> dict[str, Any]:
        """The row of a search."""
        raise NotImplementedError


class HiddenNumberPrompts(HiddenNumberTask):
    """Ranges to search, to sample from and to measure: rows of `prompt`, `low`, `high`, `number`, and `answer`.

    Args:
        split: "train", "validation" or "test"; no range with its number is in two of them, whatever the seeds.
        size: Number of prompts, each at most once.
        seed: Seed of the draw.
        width: Most numbers in a range; there are more than half as many.

    Examples:
        >>> HiddenNumberPrompts(split="test", size=1)[0]
        {'prompt': [{'role': 'user', 'content': '55-76'}], 'low': 55, 'high': 76, 'number': 72, 'answer': '72'}
    """

    def __init__(self, *, split: Split, size: Count, seed: Seed = 0, width: Width = 32) -> None:
        super().__init__(split=split, size=size, seed=seed, width=width, distinct=True)

    def row(self, index: int) -> dict[str, Any]:
        """One prompt."""
        search = self.searches[index]
        return {"prompt": [_asked(search)], **search._asdict(), "answer": str(search.number)}


class _Played(HiddenNumberTask):
    """Searches with what a player asked and answered."""

    def __init__(
        self, *, split: Split, size: Count, seed: Seed = 0, width: Width = 32, carelessness: Share = 1.0
    ) -> None:
        check_options(_Played.__init__, locals())
        super().__init__(split=split, size=size, seed=seed, width=width, distinct=False)
        self.plays = list(play_all(self.searches, carelessness, seed))

    def right(self) -> list[bool]:
        """Which answers are right."""
        pairs = zip(self.searches, self.plays, strict=True)
        return [search.number == answer for search, (_, answer) in pairs]


class HiddenNumberNotes(_Played):
    """Notes of careless players, for pretraining: rows of `text`, such as "17-48?33>17-33?24>25-33=29".

    Args:
        split: "train", "validation" or "test"; no range with its number is in two of them, whatever the seeds.
        size: Number of lines.
        seed: Seed of the draw and of the players.
        width: Most numbers in a range; there are more than half as many.
        carelessness: From 0, who halves what is left, to 1, who asks one by one and answers one too many (see `play`).

    Examples:
        >>> HiddenNumberNotes(split="train", size=1, width=16, carelessness=0.0)[0]
        {'text': '59-71?65>59-65?62>59-62?60>59-60?59>60-60=60'}
    """

    def row(self, index: int) -> dict[str, Any]:
        """One line."""
        search, (asked, answer) = self.searches[index], self.plays[index]
        questions = "".join(f"?{one.number}>{written(one.low, one.high)}" for one in asked)
        return {"text": f"{written(search.low, search.high)}{questions}={answer}"}


class HiddenNumberEpisodes(_Played):
    """Conversations of careless players, for supervised fine-tuning: rows of `messages` with calls, and `tools`.

    Args:
        split: "train", "validation" or "test"; no range with its number is in two of them, whatever the seeds.
        size: Number of conversations.
        seed: Seed of the draw and of the players.
        width: Most numbers in a range; there are more than half as many.
        carelessness: From 0, who halves what is left, to 1, who asks one by one and answers one too many (see `play`).

    Examples:
        >>> row = HiddenNumberEpisodes(split="train", size=1, carelessness=0.0)[0]
        >>> [message["role"] for message in row["messages"]][:4], row["tools"][0]["function"]["name"]
        (['user', 'assistant', 'tool', 'assistant'], 'ask')
    """

    def row(self, index: int) -> dict[str, Any]:
        """One conversation."""
        search, (asked, answer) = self.searches[index], self.plays[index]
        turns = [message for question in asked for message in _turn(question)]
        messages = [_asked(search), *turns, {"role": "assistant", "content": str(answer)}]
        return {"messages": messages, "tools": _schemas()}


def _asked(search: Search) -> dict[str, Any]:
    return {"role": "user", "content": written(search.low, search.high)}


def _turn(question: Question) -> tuple[dict[str, Any], dict[str, Any]]:
    call = {"type": "function", "function": {"name": "ask", "arguments": {"number": question.number}}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    return said, {"role": "tool", "name": "ask", "content": written(question.low, question.high)}


@cache
def _schemas() -> list[dict[str, Any]]:
    from transformers.utils import get_json_schema

    return [get_json_schema(HiddenNumber().ask)]
