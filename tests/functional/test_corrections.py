"""Weights of off-policy tokens by loops over tokens, as their papers say it."""

from __future__ import annotations

import math

import pytest
import torch

from alignment_modules.functional import CORRECTIONS, Correction, Surrogate, as_correction


def samples(rows=24, time=8, spread=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sampled = -2 * torch.rand(rows, time, generator=generator, dtype=torch.float64) - 0.01
    scored = (sampled + spread * torch.randn(rows, time, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, time, generator=generator) < 0.7
    mask[2] = False
    return sampled, scored, advantages, mask


# A completion: x the log-ratios of scored to sampled, q and p both log-probabilities, A the advantage: its weights.


def tis(x, q, p, A):
    return [min(math.exp(v), 2) for v in x]


def tis_sequence(x, q, p, A):
    return [min(math.exp(sum(x)), 2)] * len(x)


def icepop(x, q, p, A):
    return [math.exp(v) if 0.5 <= math.exp(v) <= 5 else 0 for v in x]


def mis(x, q, p, A):
    ratio = math.exp(sum(x))
    return [ratio if ratio <= 3 else 0] * len(x)


def geo_rs(x, q, p, A):
    kept = 0.999 <= math.exp(sum(x) / len(x)) <= 1.002
    return [math.exp(v) if kept else 0 for v in x]


def k3_rs(x, q, p, A):
    return [float(sum(math.exp(v) - 1 - v for v in x) / len(x) <= 0.01)] * len(x)


def opsm(x, q, p, A):
    return [float(A >= 0 or sum(-v for v in x) / len(x) <= 1e-4)] * len(x)


def dppo_tv(x, q, p, A):
    moved = [math.exp(b) - math.exp(a) for a, b in zip(q, p, strict=True)]
    return [float(m <= 0.2 if A > 0 else m >= -0.2) for m in moved]


def dppo_kl(x, q, p, A):
    weights = []
    for a, b in zip(q, p, strict=True):
        one, two = math.exp(a), math.exp(b)
        divergence = one * math.log(one / two) + (1 - one) * math.log((1 - one) / (1 - two))
        weights.append(float(divergence <= 0.05 or (two <= one if A > 0 else two >= one)))
    return weights


PAPERS = [tis, tis_sequence, icepop, mis, geo_rs, k3_rs, opsm, dppo_tv, dppo_kl]


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.__name__)
@pytest.mark.parametrize("spread", [0.002, 0.05, 0.4, 1.5])
def test_by_loops(paper, spread):
    sampled, scored, advantages, mask = inputs = samples(spread=spread)
    weights = CORRECTIONS[paper.__name__](*inputs)
    expected = torch.zeros_like(weights)
    for row in mask.any(1).nonzero()[:, 0].tolist():
        q, p = (logps[row][mask[row]].tolist() for logps in (sampled, scored))
        log_ratios = [b - a for a, b in zip(q, p, strict=True)]
        expected[row, mask[row]] = torch.tensor(paper(log_ratios, q, p, advantages[row].item())).double()
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad


def test_every_name_has_a_loop():
    assert {paper.__name__ for paper in PAPERS} == set(CORRECTIONS)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_equal_distributions_are_left_alone(name):
    sampled, _, advantages, mask = samples()
    assert torch.equal(CORRECTIONS[name](sampled, sampled, advantages, mask), mask.double())


@pytest.mark.parametrize("name", CORRECTIONS)
def test_what_is_not_finite_weighs_nothing(name):
    sampled, scored, advantages, mask = samples(spread=1e-4)
    mask[0] = True
    known = CORRECTIONS[name](sampled, scored, advantages, mask)
    sampled[0, 3], scored[1, 2], sampled[~mask] = torch.nan, -torch.inf, torch.nan
    weights = CORRECTIONS[name](sampled, scored, advantages, mask)
    assert weights.isfinite().all()
    assert (weights[~mask] == 0).all()
    assert weights[0, 3] == 0
    whole = CORRECTIONS[name].level != "token"
    assert bool((weights[0] == 0).all()) == whole
    torch.testing.assert_close(weights[3:], known[3:], rtol=0, atol=0)


def test_extremes_stay_finite_in_float32():
    sampled, scored = torch.tensor([[-1e4, 0.0], [0.0, -1e4]]), torch.tensor([[0.0, -1e4], [0.0, 0.0]])
    for correction in CORRECTIONS.values():
        for advantage in (1.0, -1.0):
            weights = correction(sampled, scored, torch.full((2,), advantage), torch.ones(2, 2))
            assert weights.isfinite().all()
            assert weights.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_float32_at_least(dtype):
    inputs = (values.to(dtype) for values in samples()[:3])
    assert CORRECTIONS["tis"](*inputs, samples()[3]).dtype == torch.float32


def test_binary_kl_constant():
    """From .3 to .55 the divergence is .127442."""
    sampled, scored = torch.tensor([[0.3]]).double().log(), torch.tensor([[0.55]]).double().log()
    for high, kept in ((0.127443, 1), (0.127441, 0)):
        gate = Correction("token", "binary_kl", "mask", high=high)
        assert gate(sampled, scored, torch.ones(1).double(), torch.ones(1, 1)).item() == kept


@pytest.mark.parametrize("name", ["tv", "kl"])
def test_dppo_around_any_loss_is_the_loss_of_that_name(name):
    """`-rho A` behind the gate has the gradient of DPPO's loss, as long as no ratio exceeds its cap."""
    sampled, scored, advantages, mask = samples()
    scored.requires_grad_()
    gate = CORRECTIONS[f"dppo_{name}"](sampled, scored.detach(), advantages, mask)
    gated = Surrogate("reinforce")(scored, sampled, advantages, mask) * gate
    dppo = Surrogate(f"dppo_{name}", epsilon=0.2 if name == "tv" else None)(scored, sampled, advantages, mask)
    one, two = (torch.autograd.grad(losses.sum(), scored)[0] for losses in (gated, dppo))
    torch.testing.assert_close(one, two)
    assert ((gate == 0) & mask).any()


def test_advantages_by_token():
    sampled, scored, _, mask = samples()
    advantages = torch.randn(scored.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gate = Correction("token", "ratio", "mask", low=0.8, high=1.25, weigh=False, where="negative")
    ratio = (scored - sampled).exp()
    expected = mask & ~((advantages < 0) & ((ratio < 0.8) | (ratio > 1.25)))
    assert torch.equal(gate(sampled, scored, advantages, mask), expected.double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "batch"}, "correction.level='batch' must be 'token' or 'sequence' or 'geometric'"),
        ({"metric": "k4", "high": 1.0}, "correction.metric='k4' must be 'ratio' or 'k1'"),
        ({"high": -1.0}, "correction.high=-1.0 must be a finite number of 0 or more"),
        ({}, "correction.low=None and high=None: one of them must be given"),
        ({"metric": "k3", "high": 1.0}, "correction.action='clamp' needs metric='ratio', got 'k3'"),
        (
            {"metric": "tv", "level": "geometric", "action": "mask", "high": 1.0},
            "level='geometric' needs metric='ratio'",
        ),
        ({"high": 0.9}, "high=0.9 must be at least 1, what equal distributions have"),
        ({"low": 1.1}, "low=1.1 must be at most 1, what equal distributions have"),
        ({"low": -0.1, "high": 2.0}, "low=-0.1 must be 0 or more: metric='ratio' is"),
        ({"metric": "k2", "action": "mask", "low": 0.0, "high": 1.0}, "low=0.0: metric='k2' is never below 0"),
        ({"high": 2.0, "where": "negative"}, "where='negative' needs action='mask'"),
        ({"high": 2.0, "weigh": True}, "weigh=True needs action='mask'"),
        ({"high": 2.0, "against": "policy"}, "against='policy' needs action='mask' and weigh=False"),
        ({"high": 2.0, "action": "mask", "against": "policy"}, "against='policy' needs action='mask' and weigh=False"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Correction(**options)


def test_names():
    assert as_correction("tis") == Correction(high=2.0)
    assert as_correction(CORRECTIONS["mis"]) is CORRECTIONS["mis"]
    assert as_correction(None) is None
    with pytest.raises(ValueError, match=r"correction must be one of 'tis', .*, got 'vtrace'"):
        as_correction("vtrace")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tis", "weighed by the token-level ratio of old policy to sampled, clamped above 2"),
        (
            "icepop",
            "token-level ratio of old policy to sampled masked below 0.5 and above 5, the others weighed by it",
        ),
        ("opsm", "sequence-level k1 of policy to sampled masked above 0.0001, of negative advantages"),
    ],
)
def test_says_what_it_is(name, text):
    assert CORRECTIONS[name].describe() == text
