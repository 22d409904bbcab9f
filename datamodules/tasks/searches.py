"""Searches for hidden numbers: which split each belongs to, how they are drawn, and how a careless player asks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Annotated, NamedTuple

import numpy as np

from datamodules.ranges import Count, Range, Seed, Share, check_options
from datamodules.tasks.hidden_number import narrowed
from datamodules.tasks.problems import SPLITS, Split, split_of

LEAST, GREATEST = 10, 99
MOST_QUESTIONS = 11
Width = Annotated[int, Range(2, GREATEST - LEAST + 1)]
# How often a careless player takes the lowest number left, not the middle, and answers one too many.
_ONE_BY_ONE, _SLIP = 0.7, 0.6


class Search(NamedTuple):
    """A number and the range that it is hidden in, ends included."""

    low: int
    high: int
    number: int


class Question(NamedTuple):
    """What was asked, and the range that was left then."""

    number: int
    low: int
    high: int


def draw_searches(*, split: Split, size: Count, seed: Seed, width: Width, distinct: bool) -> list[Search]:
    """Draws ranges with a hidden number from one split, all equally likely.

    Args:
        split: "train", "validation" or "test"; no range with its number is in two of them, whatever the seeds.
        size: How many.
        seed: Seed of the draw.
        width: Most numbers in a range; there are more than half as many. Ranges lie from 10 to 99.
        distinct: Each at most once.

    Returns:
        The searches.

    Raises:
        ValueError: An argument is out of range, or the split has fewer than `size` distinct searches.
    """
    check_options(draw_searches, locals())
    every = _searches(width)
    mine = np.flatnonzero(split_of(every[:, 0] * (GREATEST + 1) + every[:, 1], every[:, 2]) == SPLITS.index(split))
    if len(mine) < (size if distinct else 1):
        raise ValueError(
            f"size={size}: the {split} split of ranges of at most {width} numbers has {len(mine)} distinct searches; "
            "take fewer or wider ranges"
        )
    rng = np.random.default_rng([seed, SPLITS.index(split), width])
    taken = mine[rng.permutation(len(mine))[:size] if distinct else rng.integers(len(mine), size=size)]
    return [Search(*search) for search in every[taken].tolist()]


@cache
def _searches(width: int) -> np.ndarray:
    """All searches, int64 [n, 3]."""
    widths = range(width // 2 + 1, width + 1)
    ranges = [(low, low + wide - 1) for wide in widths for low in range(LEAST, GREATEST + 2 - wide)]
    return np.array([(low, high, number) for low, high in ranges for number in range(low, high + 1)])


def play(search: Search, carelessness: Share, rng: np.random.Generator) -> tuple[list[Question], int]:
    """Asks as a player does who may be careless.

    With `carelessness=0` each question halves what is left, up to a single number, which is the answer. A careless
    player mostly goes through the numbers from below, one by one, and mostly answers one too many.

    Args:
        search: What is sought.
        carelessness: How often the player is careless, at each question and at the answer.
        rng: Draws of the player.

    Returns:
        The questions, and the answer, right or not.
    """
    low, high = search.low, search.high
    asked = []
    while high > low:
        number = low if rng.random() < carelessness * _ONE_BY_ONE else (low + high) // 2
        low, high = narrowed(low, high, number, search.number)
        asked.append(Question(number, low, high))
    return asked, low + int(rng.random() < carelessness * _SLIP)


def play_all(searches: list[Search], carelessness: Share, seed: Seed) -> Iterator[tuple[list[Question], int]]:
    """A play of each search, each with a generator of its own; again where it took more than 11 questions.

    Args:
        searches: What is sought.
        carelessness: As in `play`.
        seed: Seed of the players.

    Yields:
        As `play` returns.
    """
    for place, search in enumerate(searches):
        rng = np.random.default_rng([seed, place, 1])
        while len((played := play(search, carelessness, rng))[0]) > MOST_QUESTIONS:
            pass
        yield played
