"""Many rows on their way to token ids at once: what they ask of a tokenizer is asked in a few calls for all of them.

A row's way is a generator that yields what it needs, `Ids` of texts or the `Reading` of ids, and gets the answer: it is
written as if the row were alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from datamodules.text.tokens import read, tokenise

T = TypeVar("T")


class Ids(NamedTuple):
    """Asks for the ids of texts, int32 `[time]` each, with no special token added."""

    texts: tuple[str, ...]


class Reading(NamedTuple):
    """Asks for the texts of ids, `[time]` each, special tokens and spaces as they are."""

    ids: tuple[np.ndarray, ...]


Way = Generator[Ids | Reading, list[Any], T]


def together(
    tokenizer: Any, ways: Iterable[Way[T]], ids_of: Callable[[Sequence[str]], list[np.ndarray]] | None = None
) -> list[T]:
    """Goes all ways to their ends; texts that several ask for at the same time are tokenised once.

    Args:
        tokenizer: A `transformers` tokenizer.
        ways: One for each row.
        ids_of: Gives the ids of texts; None: the tokenizer does.

    Returns:
        What each way returns.

    Raises:
        ValueError: What a way or the tokenizer raises.
    """
    found: dict[int, T] = {}
    waiting: list[tuple[int, Way[T], Any]] = [(number, way, None) for number, way in enumerate(ways)]
    while waiting:
        asked: list[tuple[int, Way[T], Ids | Reading]] = []
        for number, way, answer in waiting:
            try:
                asked.append((number, way, way.send(answer)))
            except StopIteration as end:
                found[number] = end.value
        texts = list(dict.fromkeys(text for *_, ask in asked if isinstance(ask, Ids) for text in ask.texts))
        ids = dict(zip(texts, tokenise(tokenizer, texts) if ids_of is None else ids_of(texts), strict=True))
        spelled = iter(read(tokenizer, [one for *_, ask in asked if isinstance(ask, Reading) for one in ask.ids]))
        waiting = [
            (
                number,
                way,
                [ids[text] for text in ask.texts] if isinstance(ask, Ids) else [next(spelled) for _ in ask.ids],
            )
            for number, way, ask in asked
        ]
    return [found[number] for number in range(len(found))]
