"""Advantages of single tokens without a critic, by loops from the papers."""

from __future__ import annotations

import pytest
import torch

from alignment_modules.functional import gradient_norms, optimal_token_advantages, returns_to_go


def test_returns_to_go_by_loops():
    generator = torch.Generator().manual_seed(0)
    rewards, penalty = torch.randn(5, generator=generator), torch.randn(5, 7, generator=generator)
    mask = torch.rand(5, 7, generator=generator) < 0.6
    mask[3], rewards[4] = False, torch.nan
    found = returns_to_go(rewards, mask, penalty.masked_fill(~mask, torch.nan))
    for row in range(5):
        for t in range(7):
            later = sum(penalty[row, s].item() for s in range(t, 7) if mask[row, s])
            expected = rewards[row].item() - later if mask[row, t] and row != 4 else 0.0
            assert found[row, t].item() == pytest.approx(expected, abs=1e-6)
    plain = returns_to_go(rewards, mask)
    assert (plain[:4] == torch.where(mask[:4], rewards[:4, None], 0.0)).all()
    assert returns_to_go(torch.zeros(0), torch.zeros(0, 3)).shape == (0, 3)


def test_norms_are_those_of_the_gradient():
    logits = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(-1)
    logps[..., 2].sum().backward()
    found = gradient_norms(logps[..., 2].detach(), (2 * logps.detach()).logsumexp(-1))
    torch.testing.assert_close(found, logits.grad.square().sum(-1))


def optimal_by_loops(returns, p, squares, mask):
    """B_t over the completions that have a t-th token, W_t from the start; lists of one group's rows."""
    rows = [[t for t in range(len(m)) if m[t]] for m in mask]
    found = [[0.0] * len(m) for m in mask]
    for t in range(max(map(len, rows))):
        alive = [i for i, row in enumerate(rows) if len(row) > t]
        weights = {i: sum(1 - 2 * p[i][s] + squares[i][s] for s in rows[i][: t + 1]) for i in alive}
        gains = {i: returns[i][rows[i][t]] for i in alive}
        baseline = 0.0
        if len(alive) > 1:
            baseline = sum(weights[i] * gains[i] for i in alive) / sum(weights.values())
        for i in alive:
            found[i][rows[i][t]] = gains[i] - baseline
    return found


def group(generator, rows=4, time=6, vocab=5):
    """Random distributions with a token of each: logs of p and of the sum of squares, and the mask of own tokens."""
    distributions = torch.randn(rows, time, vocab, generator=generator, dtype=torch.float64).softmax(-1)
    p = distributions[..., 0]
    mask = torch.rand(rows, time, generator=generator) < 0.7
    mask[0] = True
    return p, distributions.square().sum(-1), mask


def test_optimal_token_baseline_constants():
    p, squares = torch.tensor([[0.5, 0.5], [0.25, 0.9]]), torch.tensor([[0.5, 0.5], [0.4, 0.82]])
    returns = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    norms = gradient_norms(p.log(), squares.log())
    torch.testing.assert_close(norms.cumsum(dim=1), torch.tensor([[0.5, 1.0], [0.9, 0.92]]))
    found = optimal_token_advantages(returns[None], norms[None], torch.ones(1, 2, 2))[0]
    baseline = torch.tensor([0.357143, 0.520833], dtype=torch.float64)
    torch.testing.assert_close(found, returns.double() - baseline, rtol=0, atol=5e-7)


def test_optimal_token_baseline_by_loops():
    """With gaps between own tokens, unequal lengths, and each token's own return."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        p, squares, mask = group(generator)
        returns = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        rubbish = [torch.where(mask, x, torch.nan)[None] for x in (returns, gradient_norms(p.log(), squares.log()))]
        found = optimal_token_advantages(*rubbish, mask[None])[0]
        expected = optimal_by_loops(returns.tolist(), p.tolist(), squares.tolist(), mask.tolist())
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_equal_returns_give_exactly_zero_beyond_the_second_longest_too():
    p, squares, mask = group(torch.Generator().manual_seed(2))
    mask[:, 4:] = False
    mask[0] = True
    norms = gradient_norms(p.log(), squares.log())[None]
    for value in (0.3, 1 / 3, 12345.678):
        returns = torch.full((1, 4, 6), value, dtype=torch.float64)
        assert (optimal_token_advantages(returns, norms, mask[None]) == 0).all()
    returns[0, 1] = 0.0
    found = optimal_token_advantages(returns, norms, mask[None])
    assert (found[0, 0, 4:] == returns[0, 0, 4:]).all()


def test_tokens_that_were_certain_weigh_alike():
    certain, returns = torch.zeros(1, 2, 3), torch.tensor([[[1.0] * 3, [0.0] * 3]])
    norms = gradient_norms(certain[0], certain[0])[None]
    assert (norms == 0).all()
    found = optimal_token_advantages(returns, norms, torch.ones(1, 2, 3))
    torch.testing.assert_close(found, (returns - 0.5).double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: returns_to_go(torch.zeros(2), torch.zeros(3, 4)), "first_column_of_mask must have the shape"),
        (lambda: returns_to_go(torch.zeros(3), torch.zeros(3, 4), torch.zeros(3, 5)), "penalty must have the shape"),
        (lambda: optimal_token_advantages(*[torch.zeros(1, 2, 3)] * 2, torch.zeros(1, 2, 4)), "mask must have the"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
