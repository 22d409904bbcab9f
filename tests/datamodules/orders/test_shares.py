"""How many rows of each source a batch has."""

import math
import random
from fractions import Fraction

import pytest

from datamodules.orders.shares import apportion, tempered, whole_shares


def test_shares_are_whole_and_exact():
    assert whole_shares([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_shares([3, 3, 3]) == [1, 1, 1]
    assert whole_shares([1e-9, 1]) == [1, 10**9]
    assert whole_shares([Fraction(1, 3), Fraction(2, 3)]) == [1, 2]


def test_temperature_flattens():
    rows = [1000, 10]
    assert tempered(rows, 1) == [1, 0.01]
    assert tempered(rows, 2) == pytest.approx([1, 0.1])
    assert tempered(rows, 1e9) == pytest.approx([1, 1])


@pytest.mark.parametrize("seed", range(8))
def test_no_source_ever_strays_from_its_share_by_a_row(seed):
    """Nor is one ever taken back, whatever the shares and the sizes of the batches."""
    draw = random.Random(seed)
    for _ in range(40):
        values = [draw.choice([draw.random() + 1e-3, draw.randint(1, 5), 1e-4, 100]) for _ in range(draw.randint(1, 9))]
        shares = whole_shares(values)
        counts, total = [0] * len(shares), 0
        for _ in range(40):
            total += draw.choice([1, 1, 2, 3, 7, 16])
            before, counts = counts, apportion(shares, counts, total)
            assert sum(counts) == total
            assert all(then <= now for then, now in zip(before, counts, strict=True))
            exact = [Fraction(total * share, sum(shares)) for share in shares]
            assert all(abs(share - count) < 1 for share, count in zip(exact, counts, strict=True))


def test_whole_shares_are_met_exactly():
    shares, counts = [3, 2, 1], [0, 0, 0]
    for step in range(1, 20):
        counts = apportion(shares, counts, 6 * step)
        assert counts == [3 * step, 2 * step, step]


def test_a_rare_source_comes_as_often_as_it_should():
    counts, seen = [0, 0], []
    for total in range(1, 3001):
        counts = apportion(whole_shares([0.999, 0.001]), counts, total)
        seen.append(counts[1])
    assert seen[-1] == 3
    assert all(math.floor(total / 1000) <= count <= math.ceil(total / 1000) for total, count in enumerate(seen, 1))
