"""Losses without a reference: the papers' formulas computed another way, gradients, extremes, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from alignment_modules.functional import (
    REFERENCE_FREE_LOSSES,
    log_odds,
    odds_ratio_loss,
    preference_loss,
    reference_free_loss,
)

CHOSEN, REJECTED = [-0.4, -1.3, -3.0, -0.01], [-0.9, -0.2, -3.0, -7.0]
OPTIONS = {
    "sigmoid": {"beta": 0.3, "label_smoothing": 0.1},
    "hinge": {"beta": 0.3},
    "ipo": {"beta": 0.3},
    "simpo": {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.1},
}


def logps():
    return torch.tensor(CHOSEN, dtype=torch.float64), torch.tensor(REJECTED, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(loss, chosen, rejected, alpha=0.0):
    beta, e = OPTIONS[loss]["beta"], OPTIONS[loss].get("label_smoothing", 0.0)
    if alpha:
        chosen, rejected = ((1 - math.exp(x) ** -alpha) / alpha for x in (chosen, rejected))
    d = chosen - rejected
    if loss == "hinge":
        return max(0, 1 - beta * d)
    if loss == "ipo":
        return (d - 1 / (2 * beta)) ** 2
    logits = beta * (d - OPTIONS[loss].get("gamma", 0.0) / beta)
    return -(1 - e) * math.log(sigmoid(logits)) - e * math.log(sigmoid(-logits))


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.25])
@pytest.mark.parametrize("loss", REFERENCE_FREE_LOSSES)
def test_row_by_row(loss, alpha):
    found = reference_free_loss(*logps(), loss=loss, alpha=alpha, **OPTIONS[loss])
    expected = [by_hand(loss, a, b, alpha) for a, b in zip(CHOSEN, REJECTED, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.25, 1.0])
@pytest.mark.parametrize("loss", REFERENCE_FREE_LOSSES)
def test_gradcheck(loss, alpha):
    inputs = [x.requires_grad_() for x in logps()]
    function = lambda a, b: reference_free_loss(a, b, loss=loss, alpha=alpha, **OPTIONS[loss])  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)


def test_alpha_at_two_points():
    """`(1 - p^-alpha) / alpha` at a mean log-probability of -1.3."""
    for alpha, value in ((0.25, -1.53612), (-0.25, -1.10989)):
        losses = reference_free_loss(torch.tensor([-1.3]), torch.tensor([0.0]), loss="hinge", beta=1.0, alpha=alpha)
        assert losses.item() == pytest.approx(1 - value, abs=1e-5)
    small = reference_free_loss(*logps(), loss="simpo", beta=2.0, alpha=1e-9)
    torch.testing.assert_close(small, reference_free_loss(*logps(), loss="simpo", beta=2.0))


def test_alpha_of_an_impossible_completion_is_finite():
    chosen = torch.tensor([-500.0], requires_grad=True)
    loss = reference_free_loss(chosen, torch.tensor([-1.0]), loss="simpo", beta=2.0, alpha=1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(chosen.grad).all()


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_is_the_loss_with_a_reference_to_which_all_is_as_likely(loss):
    zero = torch.zeros(4, dtype=torch.float64)
    options = OPTIONS[loss]
    expected = preference_loss(*logps(), zero, zero, loss=loss, **options)
    torch.testing.assert_close(reference_free_loss(*logps(), loss=loss, **options), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("loss", REFERENCE_FREE_LOSSES)
def test_identical_sides_leave_their_completion_alone(loss, alpha):
    """What both sides share gets no gradient in sum."""
    shared = logps()[0].requires_grad_()
    reference_free_loss(shared, shared, loss=loss, alpha=alpha, **OPTIONS[loss]).sum().backward()
    assert shared.grad.abs().max() < 1e-12


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_gradient_vanishes_at_the_bradley_terry_optimum(loss):
    """Where pair (i, j) is preferred with probability s(r_i - r_j), the optimum is `(r - gamma's share) / beta`."""
    rewards = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    scores = (rewards / 0.5 - 9.0).requires_grad_()
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    probability = torch.sigmoid(rewards[first] - rewards[second])
    losses = reference_free_loss(scores[first], scores[second], loss=loss, beta=0.5)
    (probability * losses).sum().backward()
    assert scores.grad.abs().max() < 1e-12


def test_odds_ratio_by_hand():
    expected = []
    for a, b in zip(CHOSEN, REJECTED, strict=True):
        p, q = math.exp(a), math.exp(b)
        expected.append(-math.log(sigmoid(math.log((p / (1 - p)) / (q / (1 - q))))))
    assert odds_ratio_loss(*logps()).tolist() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(odds_ratio_loss, [x.requires_grad_() for x in logps()])


def test_odds_ratio_of_identical_sides():
    shared = logps()[0].requires_grad_()
    losses = odds_ratio_loss(shared, shared)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    assert shared.grad.abs().max() < 1e-12


def test_odds_keep_their_digits():
    """In float32 `1 - exp(-1e-6)` has two digits left, and `log(1 - exp(-1e-9))` is infinite."""
    values = [-1e-6, -1e-3, -0.69, -0.7, -40.0]
    expected = [x - math.log(-math.expm1(x)) for x in values]
    assert log_odds(torch.tensor(values)).tolist() == pytest.approx(expected, rel=1e-5)


def test_certain_and_impossible_completions_are_finite():
    chosen = torch.tensor([0.0, -1e4, 0.0, -1e4], requires_grad=True)
    rejected = torch.tensor([0.0, -1e4, -1e4, 0.0], requires_grad=True)
    losses = odds_ratio_loss(chosen, rejected)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(chosen.grad).all()
    assert torch.isfinite(rejected.grad).all()
    assert losses[:2].tolist() == pytest.approx([math.log(2)] * 2)
    assert losses[2] < 1e-3 < 100 < losses[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dpo"}, "loss must be one of 'sigmoid', 'hinge', 'ipo', 'simpo', got 'dpo'"),
        ({"beta": 0.0}, "beta=0.0 must be a finite number > 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5 must be a finite number in \[0, 0.5\)"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing must be 0 for loss='hinge'"),
        ({"gamma": 0.5}, "gamma must be 0 for loss='sigmoid'"),
        ({"loss": "simpo", "gamma": -0.5}, "gamma=-0.5 must be a finite number of 0 or more"),
        ({"alpha": math.nan}, "alpha=nan must be a finite number"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        reference_free_loss(*logps(), **({"beta": 0.1} | change))


def test_refuses_shapes():
    chosen, rejected = logps()
    for function in (odds_ratio_loss, lambda a, b: reference_free_loss(a, b, beta=0.1)):
        with pytest.raises(ValueError, match="must have the shape of chosen"):
            function(chosen, rejected[:2])
