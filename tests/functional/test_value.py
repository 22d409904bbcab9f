"""GAE by loops and over gaps, whitening, and the critic's loss."""

from __future__ import annotations

import pytest
import torch

from alignment_modules.functional import (
    explained_variance,
    generalized_advantages,
    length_adaptive_lambda,
    value_loss,
    whiten,
)
from alignment_modules.training.meters import Meters


def gae_by_loops(rewards, values, gamma, lam, last):
    steps = len(rewards)
    following = [*values[1:], last]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(steps)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, steps)) for t in range(steps)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_generalized_advantages_by_loops(gamma, lam, bootstrapped):
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(6, 9, generator=generator) < 0.6
    mask[4] = False
    last = torch.randn(6, generator=generator, dtype=torch.float64) if bootstrapped else None
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=last)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()
    for row in range(6):
        kept = mask[row]
        end = last[row].item() if bootstrapped else 0.0
        expected = gae_by_loops(rewards[row][kept].tolist(), values[row][kept].tolist(), gamma, lam, end)
        assert advantages[row][kept].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[row][kept].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, values[row][kept].tolist(), strict=True)], abs=1e-12
        )


def test_rubbish_outside_the_mask_is_ignored():
    rewards, values = torch.zeros(1, 4), torch.ones(1, 4)
    mask = torch.tensor([[0, 1, 1, 0]])
    expected = generalized_advantages(rewards, values, mask)
    for tensor in (rewards, values):
        tensor[0, [0, 3]] = torch.nan
    torch.testing.assert_close(generalized_advantages(rewards, values, mask), expected)


def test_targets_have_no_gradient():
    values = torch.randn(2, 3, requires_grad=True)
    advantages, returns = generalized_advantages(torch.ones(2, 3), values, torch.ones(2, 3))
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_over_a_tool_gap():
    """Tokens between two of the policy's neither discount nor reset anything; each row has its own lambda."""
    rewards = torch.tensor([[0, 0, 9.0, 9, 0, 1]]).repeat(3, 1)
    values = torch.tensor([[0.2, 0.3, 9, 9, 0.5, 0.6]]).repeat(3, 1)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]]).repeat(3, 1)
    expected = torch.tensor(
        [[0.7232, 0.6560, 0, 0, 0.4800, 0.4], [0.275, 0.35, 0, 0, 0.3, 0.4], [0.8, 0.7, 0, 0, 0.5, 0.4]]
    )
    lam = torch.tensor([0.95, 0.5, 1.0])
    advantages, returns = generalized_advantages(rewards, values, mask, lam=lam)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(returns, (advantages + values) * mask)
    for row in range(3):
        alone = generalized_advantages(rewards[:1], values[:1], mask[:1], lam=float(lam[row]))[0]
        torch.testing.assert_close(alone[0], advantages[row])


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_by_hand(ddof, shift_mean):
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    kept = values[mask]
    expected = (kept - kept.mean()) / kept.std(correction=ddof) + (0 if shift_mean else kept.mean())
    noisy = torch.where(mask, values, torch.nan)
    result = whiten(noisy, mask, shift_mean=shift_mean, ddof=ddof)
    torch.testing.assert_close(result[mask], expected)
    assert (result[~mask] == 0).all()
    assert torch.autograd.gradcheck(lambda x: whiten(x, mask, shift_mean=shift_mean, ddof=ddof), (values,))


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 12345.678])
def test_nothing_is_left_of_equal_values_but_their_mean(value):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    values = torch.full((2, 4), value)
    assert (whiten(values, mask) == 0).all()
    torch.testing.assert_close(whiten(values, mask, shift_mean=False), values * mask)
    assert (whiten(values, torch.zeros(2, 4)) == 0).all()
    single = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]])
    assert (whiten(values, single) == 0).all()


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_by_loops(clip):
    generator = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(5, 7, generator=generator) < 0.6
    result = value_loss(values, old, returns, mask, clip=clip)
    for place in torch.cartesian_prod(torch.arange(5), torch.arange(7)).tolist():
        v, o, r = (x[tuple(place)].item() for x in (values, old, returns))
        held = v if clip is None else min(max(v, o - clip), o + clip)
        expected = 0.5 * max((v - r) ** 2, (held - r) ** 2) if mask[tuple(place)] else 0.0
        assert result[tuple(place)].item() == pytest.approx(expected, rel=1e-12)


def test_value_loss_stops_where_the_old_value_holds_it():
    """Beyond the range, and away from the target, a value has no gradient; towards it, it has."""
    values = torch.tensor([[0.5, 0.5, 0.1]], requires_grad=True)
    value_loss(values, torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 1.0]]), torch.ones(1, 3)).sum().backward()
    assert values.grad[0].tolist() == pytest.approx([0.0, 1.5, -0.9])


def test_critics_targets_are_constants():
    values, old, returns = (torch.zeros(1, 2, requires_grad=True) for _ in range(3))
    value_loss(values, old, returns, torch.ones(1, 2)).sum().backward()
    assert old.grad is None
    assert returns.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: whiten(x, x[:1]), "mask must have the shape of values"),
        (lambda x: whiten(x, x, ddof=3), "ddof=3 must be an integer from 0 to 1"),
        (lambda x: value_loss(x, x, x, x, clip=0.0), "clip=0.0 must be a finite number > 0 or null"),
        (lambda x: value_loss(x, x, x[:1], x), "returns must have the shape of values"),
        (lambda x: generalized_advantages(x, x, x, lam=1.5), "lam=1.5 must be a finite number from 0 to 1"),
        (lambda x: generalized_advantages(x, x, x, lam=torch.ones(3)), r"lam must be one number or \[batch\] = \[2\]"),
        (lambda x: generalized_advantages(x, x, x, lam=torch.tensor([0.5, 2])), "lam must be finite numbers from 0"),
    ],
)
def test_critics_functions_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))


def test_generalized_advantages_refuse():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"gamma=1.5 must be a finite number from 0 to 1"):
        generalized_advantages(x, x, x, gamma=1.5)
    with pytest.raises(ValueError, match="values must have the shape of rewards"):
        generalized_advantages(x, x[:1], x)
    with pytest.raises(ValueError, match="bootstrap"):
        generalized_advantages(x, x, x, bootstrap=torch.zeros(3))


def by_turns(rewards, values, mask, gamma, lam, last):
    """Turns as lists of places, each one step in time, by plain loops over one row."""
    turns, before = [], False
    for place, own in enumerate(mask):
        if own and not before:
            turns.append([])
        if own:
            turns[-1].append(place)
        before = own
    summed = [sum(rewards[place] for place in turn) for turn in turns]
    found = gae_by_loops(summed, [values[turn[0]] for turn in turns], gamma, lam, last)
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for turn, advantage in zip(turns, found, strict=True):
        for place in turn:
            advantages[place], returns[place] = advantage, advantage + values[turn[0]]
    return advantages, returns


@pytest.mark.parametrize("bootstrapped", [False, True])
def test_turns_by_loops(bootstrapped):
    generator = torch.Generator().manual_seed(3)
    rewards, values = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(6, 9, generator=generator) < 0.6
    mask[4], mask[5] = False, True
    last = torch.randn(6, generator=generator, dtype=torch.float64) if bootstrapped else None
    lam = torch.linspace(0, 1, 6, dtype=torch.float64)
    outside = rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.nan)
    found = generalized_advantages(*outside, mask, gamma=0.9, lam=lam, bootstrap=last, unit="turn")
    for row in range(6):
        end = last[row].item() if bootstrapped else 0.0
        given = rewards[row].tolist(), values[row].tolist(), mask[row].tolist()
        for result, expected in zip(found, by_turns(*given, 0.9, float(lam[row]), end), strict=True):
            assert result[row].tolist() == pytest.approx(expected, abs=1e-12)


def test_decoupled_and_length_adaptive():
    """Forty tokens, one reward at the end: returns of lambda 1, advantages of the lambda that the length gives."""
    rewards, values = torch.zeros(1, 40), torch.linspace(0.1, 0.9, 40)[None]
    rewards[0, -1] = 1.0
    mask = torch.ones(1, 40)
    lam = length_adaptive_lambda(mask.sum(dim=1), 0.05)
    assert lam.tolist() == [0.5]
    advantages = generalized_advantages(rewards, values, mask, lam=lam)[0][0]
    assert advantages[[0, 39]].tolist() == pytest.approx([0.0410256, 0.1], abs=1e-6)
    for fixed, expected in ((0.95, 0.3682862), (1.0, 0.9)):
        assert float(generalized_advantages(rewards, values, mask, lam=fixed)[0][0, 0]) == pytest.approx(expected)
    returns = generalized_advantages(rewards, values, mask, lam=1.0)[1]
    torch.testing.assert_close(returns, torch.ones(1, 40))


def test_explained_variance_from_sums():
    """Pieces and ranks add up to the variance of the whole; constants of either side change nothing."""
    generator = torch.Generator().manual_seed(0)
    values, returns = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(7, 5, generator=generator) < 0.6
    v, r = values[mask], returns[mask]
    expected = 1.0 - float((r - v).var() / r.var())
    meters = Meters()
    for rows in (slice(0, 2), slice(2, 2), slice(2, 7)):
        noisy = values[rows].masked_fill(~mask[rows], torch.nan)
        meters.update({"ev": explained_variance(noisy + 3.0, returns[rows], mask[rows])})
    assert meters.compute(lambda sums, how: sums)["ev"] == pytest.approx(expected, rel=1e-12)


def test_equal_returns_have_no_variance_to_explain():
    meters = Meters()
    meters.update({"ev": explained_variance(torch.rand(3, 4), torch.full((3, 4), 0.3), torch.ones(3, 4))})
    assert meters.compute(lambda sums, how: sums) == {}


def test_options_of_time():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="unit='row'"):
        generalized_advantages(x, x, x, unit="row")
    with pytest.raises(ValueError, match=r"alpha=0\.0 must be a finite number > 0"):
        length_adaptive_lambda(torch.ones(2), 0.0)
