"""Tokens of high covariance and of high entropy, against sorts and draws in plain loops."""

from __future__ import annotations

import pytest
import torch

from alignment_modules.functional import Surrogate, high_covariance, token_covariance, top_quantile


def samples(tokens=500, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(tokens, generator=generator, dtype=torch.float64)
    advantages = 2 * torch.randn(tokens, generator=generator, dtype=torch.float64)
    clipped = torch.rand(tokens, generator=generator) < 0.3
    return logps, advantages, clipped, torch.rand(tokens, generator=generator, dtype=torch.float64)


def by_loops(logps, advantages):
    logps, advantages = logps.tolist(), advantages.tolist()
    means = sum(logps) / len(logps), sum(advantages) / len(advantages)
    return [(one - means[0]) * (two - means[1]) for one, two in zip(logps, advantages, strict=True)]


def test_covariance():
    logps, advantages, *_ = samples()
    covariance = token_covariance(logps, advantages)
    assert covariance.tolist() == pytest.approx(by_loops(logps, advantages))
    assert covariance.mean().item() == pytest.approx(torch.cov(torch.stack([logps, advantages]), correction=0)[0, 1])


@pytest.mark.parametrize("share", [2e-4, 0.01, 0.1, 1.0])
def test_clip_cov_draws_its_share_between_the_bounds(share):
    logps, advantages, clipped, draws = samples()
    chosen = high_covariance(Surrogate("clip_cov", loss_options={"share": share}), logps, advantages, clipped, draws)
    covariance = by_loops(logps, advantages)
    open_to_it = [i for i in range(500) if 1 < covariance[i] < 5 and not clipped[i]]
    drawn = sorted(open_to_it, key=lambda i: draws[i].item())[: max(int(share * 500), 1)]
    assert chosen.nonzero()[:, 0].tolist() == sorted(drawn)
    assert len(open_to_it) > 20


@pytest.mark.parametrize("share", [2e-4, 0.01, 0.1])
def test_kl_cov_takes_the_highest(share):
    logps, advantages, clipped, draws = samples()
    chosen = high_covariance(Surrogate("kl_cov", loss_options={"share": share}), logps, advantages, clipped, draws)
    covariance = by_loops(logps, advantages)
    highest = sorted(range(500), key=lambda i: -covariance[i])[: max(int(share * 500), 1)]
    assert chosen.nonzero()[:, 0].tolist() == sorted(highest)


def test_nothing_to_choose_from():
    empty = torch.zeros(0)
    for loss in ("clip_cov", "kl_cov"):
        assert high_covariance(Surrogate(loss), empty, empty, empty.bool(), empty).shape == (0,)
    same = torch.zeros(3)
    assert not high_covariance(Surrogate("clip_cov"), same, same, same.bool(), same).any()
    with pytest.raises(ValueError, match="loss='dapo' treats no token apart"):
        high_covariance(Surrogate(), *samples())


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.333, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 10, 501])
def test_top_quantile(share, tokens):
    values = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    assert torch.equal(top_quantile(values, share), values >= values.quantile(1 - share))
    assert top_quantile(values, share).any()
    assert not top_quantile(values[:0], share).any()
