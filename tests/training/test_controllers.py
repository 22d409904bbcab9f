"""Coefficients that follow a divergence or an entropy: against loops over plain numbers, and across checkpoints."""

import math
import random

import pytest
import torch

from alignment_modules.functional.statistics import Statistic
from alignment_modules.training.controllers import EntropyController, KLController


def alone(values, how):
    return values


def drive(controller, rollouts):
    """Measures each rollout's pieces (total, tokens) and steps; the values after each."""
    values = []
    for pieces, rows in rollouts:
        for total, tokens in pieces:
            controller.measure(Statistic(torch.tensor(total), tokens))
        controller.step(alone, rows)
        values.append(controller.value.item())
    return values


def draw(seed, count=40):
    """Rollouts of random pieces: `([(total, tokens)], completions)`."""
    random.seed(seed)
    tokens = [[random.randint(1, 9) for _ in range(random.randint(1, 4))] for _ in range(count)]
    return [([(random.uniform(-1, 3) * n, float(n)) for n in sizes], random.randint(1, 64)) for sizes in tokens]


def mean(pieces):
    return sum(total for total, _ in pieces) / sum(tokens for _, tokens in pieces)


def test_kl_follows_the_papers_rule():
    rollouts, beta, expected = draw(0), 0.2, []
    for pieces, rows in rollouts:
        error = min(max(mean(pieces) / 0.5 - 1, -0.2), 0.2)
        beta *= 1 + error * min(rows / 50, 1)
        expected.append(beta)
    assert drive(KLController(0.2, target=0.5, horizon=50), rollouts) == pytest.approx(expected, rel=1e-6)


def test_entropy_follows_the_papers_rule():
    rollouts, coefficient, expected, applied = draw(1), 0.01, [], []
    for pieces, _ in rollouts:
        low = mean(pieces) <= 0.9
        coefficient = min(max(coefficient + (0.005 if low else -0.005), 0.0), 1.0)
        expected.append(coefficient)
        applied.append(coefficient if low else 0.0)
    controller, seen = EntropyController(0.01, target=0.9), []
    for rollout in rollouts:
        drive(controller, [rollout])
        seen.append((controller.value.item(), controller.coefficient.item()))
    assert seen == [pytest.approx(pair) for pair in zip(expected, applied, strict=True)]
    assert 0.0 in applied
    assert any(applied)


def test_entropy_stays_within_0_and_1():
    low, high = ([(0.0, 1.0)], 8), ([(5.0, 1.0)], 8)
    controller = EntropyController(0.5, target=1.0, delta=0.4)
    assert drive(controller, [low] * 3) == pytest.approx([0.9, 1.0, 1.0])
    assert drive(controller, [high] * 3) == pytest.approx([0.6, 0.2, 0.0])


def test_the_first_rollout_has_no_bonus():
    assert EntropyController(0.5, target=1.0).coefficient == 0


@pytest.mark.parametrize("make", [lambda: KLController(0.2, target=0.5), lambda: EntropyController(0.2, target=0.5)])
class TestEvery:
    def test_the_split_changes_nothing(self, make):
        rollouts = draw(2)
        whole = [([(sum(t for t, _ in pieces), sum(n for _, n in pieces))], rows) for pieces, rows in rollouts]
        assert drive(make(), rollouts) == pytest.approx(drive(make(), whole), rel=1e-6)

    def test_ranks_are_added_up(self, make):
        one, two = make(), make()
        drive(one, [([(1.0, 2.0), (3.0, 1.0)], 12)])
        two.measure(Statistic(torch.tensor(1.0), 2.0))
        two.step(lambda values, how: {"sum": values + torch.tensor([3.0, 1.0, 8.0])}[how], 4)
        assert two.value == one.value

    def test_without_a_token_nothing_changes(self, make):
        controller = make()
        before = drive(controller, [([(1.0, 4.0)], 8)])
        assert drive(controller, [([], 8), ([(0.0, 0.0)], 8)]) == before * 2

    def test_goes_on_from_its_state_bit_for_bit(self, make):
        rollouts, whole, first, second = draw(3), make(), make(), make()
        expected = drive(whole, rollouts)
        drive(first, rollouts[:15])
        second.load_state_dict(torch.load(save(first.state_dict()), weights_only=True))
        assert drive(second, rollouts[15:]) == expected[15:]
        assert second.state_dict() == whole.state_dict()

    def test_nothing_is_read_back(self, make, monkeypatch):
        """On a device that computes later, reading a number would wait for it."""
        controller = make()

        def refuse(*_):
            raise AssertionError("read back")

        for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        controller.measure(Statistic(torch.ones(()), 4.0))
        controller.step(alone, 1)


def save(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLController(0.0, target=1.0), "coefficient=0.0 must be a finite number > 0"),
        (lambda: KLController(0.1, target=0.0), "target=0.0 must be a finite number > 0"),
        (lambda: KLController(0.1, target=math.nan), "target=nan"),
        (lambda: KLController(0.1, target=1.0, horizon=0), "horizon=0"),
        (lambda: EntropyController(-0.1, target=1.0), "coefficient=-0.1 must be a finite number from 0 to 1"),
        (lambda: EntropyController(target=-1.0), "target=-1.0"),
        (lambda: EntropyController(target=1.0, delta=0.0), "delta=0.0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
