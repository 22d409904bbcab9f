"""Addition as a complete set of data: a careless corpus, a few demonstrations, and prompts with their answers."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from datamodules.ranges import Count, Seed, Share, check_options
from datamodules.tasks.characters import character_tokenizer
from datamodules.tasks.problems import SPLITS, Digits, Split, draw_problems, split_of, units_first, write_sums


class AdditionTask(Dataset[dict[str, Any]]):
    """Base of the three data sets: problems of one split, written units first.

    Args:
        split: "train", "validation" or "test"; no problem is in two of them, whatever the seeds.
        size: Number of rows.
        seed: Seed of the draw.
        digits: Digits of a summand; shorter numbers are filled with zeros.
        short: Whether small numbers are as common as large ones (else all numbers are equally likely).
        distinct: Whether each problem comes at most once.
        carelessness: How often the writer of the answers forgets a carry, from 0 (never) to 1 (see `slip_rates`).
    """

    def __init__(
        self, *, split: Split, size: Count, seed: Seed, digits: Digits, short: bool, distinct: bool, carelessness: Share
    ) -> None:
        self.split, self.digits = split, digits
        self.first, self.second = draw_problems(
            split=split, size=size, seed=seed, digits=digits, short=short, distinct=distinct
        )
        if not (split_of(self.first, self.second) == SPLITS.index(split)).all():
            raise RuntimeError(f"split={split!r}: problems of another split were drawn")
        self.sums, self.right = write_sums(self.first, self.second, digits=digits, carelessness=carelessness, seed=seed)

    @cached_property
    def tokenizer(self) -> Any:
        """One token a digit or sign, with a chat template."""
        return character_tokenizer()

    def __len__(self) -> int:
        return len(self.sums)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index={index} is outside {len(self)} rows")
        problem = "+".join(units_first(int(numbers[index]), self.digits) for numbers in (self.first, self.second))
        return self.row(problem, units_first(int(self.sums[index]), self.digits + 1))

    def row(self, problem: str, answer: str) -> dict[str, Any]:
        """The row of a problem such as "743+685" with an answer such as "3390"."""
        raise NotImplementedError

    def problems(self) -> set[tuple[int, int]]:
        """The problems that occur, each with its smaller summand first."""
        pairs = np.sort(np.stack((self.first, self.second), axis=1), axis=1)
        return set(map(tuple, pairs.tolist()))


class AdditionCorpus(AdditionTask):
    """Lines of a careless writer, for pretraining: rows of `text`, such as "743+685=3390".

    By default 23 % of the lines are wrong: a carry is forgotten. Small numbers are common, since a model
    learns to add them first.

    Args:
        split: "train", "validation" or "test"; no problem is in two of them, whatever the seeds.
        size: Number of lines.
        seed: Seed of the draw and of the slips.
        digits: Digits of a summand; shorter numbers are filled with zeros.
        short: Whether small numbers are as common as large ones (else all numbers are equally likely).
        carelessness: How often a carry is forgotten, from 0 (never) to 1 (see `slip_rates`).

    Examples:
        >>> corpus = AdditionCorpus(split="train", size=2, short=False, carelessness=0.0)
        >>> len(corpus), len(corpus[0]["text"])
        (2, 12)
    """

    def __init__(
        self,
        *,
        split: Split,
        size: Count,
        seed: Seed = 0,
        digits: Digits = 3,
        short: bool = True,
        carelessness: Share = 1.0,
    ) -> None:
        super().__init__(
            split=split, size=size, seed=seed, digits=digits, short=short, distinct=False, carelessness=carelessness
        )

    def row(self, problem: str, answer: str) -> dict[str, Any]:
        """One line."""
        return {"text": f"{problem}={answer}"}


class AdditionInstructions(AdditionTask):
    """Demonstrations for supervised fine-tuning: rows of `messages`, a question and its answer.

    Args:
        split: "train", "validation" or "test"; no problem is in two of them, whatever the seeds.
        size: Number of conversations.
        seed: Seed of the draw and of the slips.
        digits: Digits of a summand; shorter numbers are filled with zeros.
        carelessness: How often a carry is forgotten, from 0 (never) to 1 (see `slip_rates`).

    Examples:
        >>> [message["role"] for message in AdditionInstructions(split="train", size=1)[0]["messages"]]
        ['user', 'assistant']
    """

    def __init__(
        self, *, split: Split, size: Count, seed: Seed = 0, digits: Digits = 3, carelessness: Share = 1.0
    ) -> None:
        super().__init__(
            split=split, size=size, seed=seed, digits=digits, short=False, distinct=True, carelessness=carelessness
        )

    def row(self, problem: str, answer: str) -> dict[str, Any]:
        """One conversation."""
        return {"messages": [{"role": "user", "content": problem}, {"role": "assistant", "content": answer}]}


class AdditionPrompts(AdditionTask):
    """Distinct questions with their right answers, to sample from and to measure: rows of `prompt` and `answer`.

    Args:
        split: "train", "validation" or "test"; no problem is in two of them, whatever the seeds.
        size: Number of questions.
        seed: Seed of the draw.
        digits: Digits of a summand; shorter numbers are filled with zeros.
        chat: Whether `prompt` is a conversation; else the beginning of a line, such as "743+685=".

    Examples:
        >>> question = AdditionPrompts(split="test", size=1, chat=False)[0]
        >>> sorted(question), question["prompt"][-1]
        (['answer', 'prompt'], '=')
    """

    def __init__(self, *, split: Split, size: Count, seed: Seed = 0, digits: Digits = 3, chat: bool = True) -> None:
        check_options(AdditionPrompts.__init__, locals())
        super().__init__(split=split, size=size, seed=seed, digits=digits, short=False, distinct=True, carelessness=0.0)
        self.chat = chat

    def row(self, problem: str, answer: str) -> dict[str, Any]:
        """One question."""
        prompt = [{"role": "user", "content": problem}] if self.chat else f"{problem}="
        return {"prompt": prompt, "answer": answer}
