"""Every policy-gradient loss and its gradient by loops over tokens, written from the papers."""

from __future__ import annotations

import math

import pytest
import torch

from alignment_modules.functional import Surrogate, aggregate, policy_gradient_loss
from alignment_modules.functional.kl import binary_kl


def samples(rows=6, time=8, seed=0, spread=0.4):
    generator = torch.Generator().manual_seed(seed)
    token_logps = -2 * torch.rand(rows, time, generator=generator, dtype=torch.float64) - 0.01
    old = (token_logps + spread * torch.randn(rows, time, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, time, generator=generator) < 0.7
    mask[2] = False
    return token_logps, old, advantages, mask


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def clip(x, low, high):
    return min(max(x, low), high)


# One token: x its log-ratio, xs those of its completion, l its log-probability, m that of the old policy, A: the loss
# and its derivative by that log-probability, with what the papers hold constant held constant. Of sequence ratios the
# derivative is that of the completion's sum.


def reinforce(x, xs, logp, old, A):
    return -math.exp(x) * A, -math.exp(x) * A


def reinforce_sequence(x, xs, logp, old, A):
    s = math.exp(sum(xs) / len(xs))
    return -s * A, -s * A


def sapo(x, xs, logp, old, A):
    t, rho = 1.0 if A > 0 else 1.05, math.exp(x)
    gate = sigmoid(t * (rho - 1))
    return -4 / t * gate * A, -4 * gate * (1 - gate) * rho * A


def sapo_sequence(x, xs, logp, old, A):
    return sapo(sum(xs) / len(xs), xs, logp, old, A)


def gmpo(x, xs, logp, old, A):
    s = 1 if A > 0 else -1
    bounded = [s * min(s * y, s * clip(y, -0.4, 0.4)) for y in xs]
    mean = math.exp(sum(bounded) / len(xs))
    return -A * mean, -A * mean * (s * x <= s * clip(x, -0.4, 0.4))


def luspo(x, xs, logp, old, A):
    s = math.exp(sum(xs) / len(xs))
    kept = s * A <= clip(s, 0.998, 1.0025) * A
    return -min(s * A, clip(s, 0.998, 1.0025) * A), -s * A * kept


def vespo(x, xs, logp, old, A):
    k, rate = (2, 3) if A >= 0 else (3, 2)
    w = math.exp(sum(xs))
    phi = math.exp(rate) * w**k * math.exp(-rate * w)
    return -phi * A * logp, -phi * A


def dppo_tv(x, xs, logp, old, A):
    moved = math.exp(logp) - math.exp(old)
    kept = moved <= 0.2 if A > 0 else moved >= -0.15
    return -min(math.exp(x), 20) * A * logp * kept, -min(math.exp(x), 20) * A * kept


def dppo_kl(x, xs, logp, old, A):
    p, q = math.exp(logp), math.exp(old)
    divergence = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    kept = divergence <= 0.05 or (p <= q if A > 0 else p >= q)
    return -min(math.exp(x), 20) * A * logp * kept, -min(math.exp(x), 20) * A * kept


def kl_cov(x, xs, logp, old, A):
    return -math.exp(x) * A + abs(x), -math.exp(x) * A + math.copysign(1, x)


def clip_cov(x, xs, logp, old, A):
    return 0.0, 0.0


PAPERS = {
    "reinforce": (reinforce, {}),
    "reinforce sequence": (reinforce_sequence, {"importance_level": "sequence"}),
    "reinforce sequence_token": (reinforce_sequence, {"importance_level": "sequence_token"}),
    "sapo": (sapo, {}),
    "sapo sequence": (sapo_sequence, {"importance_level": "sequence"}),
    "gmpo": (gmpo, {}),
    "luspo": (luspo, {}),
    "vespo": (vespo, {}),
    "dppo_tv": (dppo_tv, {}),
    "dppo_kl": (dppo_kl, {}),
    "kl_cov": (kl_cov, {}),
    "clip_cov": (clip_cov, {}),
}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("spread", [0.05, 0.4, 1.5])
def test_by_loops(name, spread):
    paper, options = PAPERS[name]
    token_logps, old, advantages, mask = samples(rows=24, spread=spread)
    token_logps.requires_grad_()
    covariant = mask if name.endswith("cov") else None
    options = {"loss": name.split()[0], "covariant": covariant, **options}
    losses = policy_gradient_loss(token_logps, old, advantages, mask, **options)
    (gradient,) = torch.autograd.grad(losses.sum(), token_logps)
    expected, derivative = torch.zeros_like(losses), torch.zeros_like(losses)
    for row, token in mask.nonzero().tolist():
        log_ratios = (token_logps - old)[row][mask[row]].tolist()
        x, logp, one = (token_logps - old)[row, token].item(), token_logps[row, token].item(), old[row, token].item()
        expected[row, token], derivative[row, token] = paper(x, log_ratios, logp, one, advantages[row].item())
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, derivative)


def test_gmpo_constants():
    x = torch.tensor([[0.6, -0.1, -0.6]], dtype=torch.float64)
    for advantage, value in ((1.0, -0.904837), (-1.0, 1.033895)):
        losses = policy_gradient_loss(x, 0 * x, torch.tensor([advantage]).double(), torch.ones(1, 3), loss="gmpo")
        assert losses[0].tolist() == pytest.approx([value] * 3, abs=1e-6)


@pytest.mark.parametrize(("w", "advantage", "phi"), [(1.5, 1.0, 0.502043), (0.5, -1.0, 0.339785), (1.0, 1.0, 1.0)])
def test_vespo_constants(w, advantage, phi):
    logps = torch.full((1, 2), math.log(w) / 2, dtype=torch.float64, requires_grad=True)
    inputs = logps, torch.zeros(1, 2).double(), torch.tensor([advantage]).double(), torch.ones(1, 2)
    policy_gradient_loss(*inputs, loss="vespo").sum().backward()
    assert (-logps.grad[0] / advantage).tolist() == pytest.approx([phi, phi], abs=1e-6)
    total, count, _ = Surrogate("vespo").statistics(*inputs)["vespo/phi_seq_mean"]
    assert (total / count).item() == pytest.approx(phi, abs=1e-6)


def test_binary_kl_constant():
    sampled, scored = torch.tensor([0.3, 0.3]).double().log(), torch.tensor([0.55, 0.3]).double().log()
    assert binary_kl(sampled, scored).tolist() == pytest.approx([0.127442, 0.0], abs=1e-6)
    ends = torch.tensor([0.0, -50.0])
    assert binary_kl(ends, ends.flip(0)).isfinite().all()


@pytest.mark.parametrize(("loss", "divergence"), [("dppo_kl", 0.127442), ("dppo_tv", 0.25)])
def test_dppo_masks_what_has_moved_on(loss, divergence):
    """From .3 to .55: masked where the advantage pushes further, never where it pushes back."""
    old, new = torch.full((1, 1), 0.3).double().log(), torch.full((1, 1), 0.55).double().log()
    for bound, advantage, kept in ((0.99, 1.0, True), (1.01, 1.0, False), (1.01, -1.0, True)):
        logps, range_ = new.clone().requires_grad_(), divergence / bound
        options = {"loss": loss, "epsilon": range_, "epsilon_high": range_}
        policy_gradient_loss(logps, old, torch.tensor([advantage]).double(), torch.ones(1, 1), **options).backward()
        assert bool(logps.grad != 0) == kept


def test_delta_is_the_dual_clip():
    """`max(min(rho A, clip(rho) A), c A)` where A < 0, on 2,000 points."""
    token_logps, old, advantages, mask = samples(rows=250, seed=1, spread=1.5)
    ratio, advantage = (token_logps - old).exp(), advantages[:, None]
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    dual = -torch.where(advantage < 0, torch.maximum(clipped, 3.0 * advantage), clipped).masked_fill(~mask, 0)
    torch.testing.assert_close(policy_gradient_loss(token_logps, old, advantages, mask, delta=3.0), dual)
    assert (ratio > 3)[mask & (advantage < 0)].any()


def test_sequence_token_is_the_sequence_for_one_advantage_and_learns_tokens_otherwise():
    token_logps, old, advantages, mask = samples()
    token_logps.requires_grad_()
    wide = {"loss": "grpo", "epsilon": 0.5}

    def gradient(level, advantages):
        losses = policy_gradient_loss(token_logps, old, advantages, mask, importance_level=level, **wide)
        return losses, torch.autograd.grad(losses.sum(), token_logps)[0]

    for one, other in zip(gradient("sequence", advantages), gradient("sequence_token", advantages), strict=True):
        torch.testing.assert_close(one, other)
    alone = torch.zeros_like(token_logps)
    row, token = mask.nonzero()[0].tolist()
    alone[row, token] = 1.0
    assert gradient("sequence_token", alone)[1].nonzero().tolist() == [[row, token]]
    assert len(gradient("sequence", alone)[1].nonzero()) == mask[row].sum()


def test_gmpo_of_token_advantages_takes_their_mean():
    token_logps, old, _, mask = samples()
    advantages = torch.randn(token_logps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    losses = policy_gradient_loss(token_logps, old, advantages, mask, loss="gmpo")
    for row in range(6):
        kept = [t for t in range(8) if mask[row, t]]
        if not kept:
            continue
        signs = [math.copysign(1, advantages[row, t]) for t in kept]
        logs = [(token_logps - old)[row, t].item() for t in kept]
        bounded = [s * min(s * x, s * clip(x, -0.4, 0.4)) for s, x in zip(signs, logs, strict=True)]
        mean = sum(advantages[row, t].item() for t in kept) / len(kept)
        expected = -mean * math.exp(sum(bounded) / len(kept))
        assert losses[row, kept].tolist() == pytest.approx([expected] * len(kept))


def test_clip_cov_elsewhere_is_the_clipped_loss():
    inputs = samples()
    nowhere = torch.zeros_like(inputs[-1])
    for loss, other in (("clip_cov", "dapo"), ("kl_cov", "reinforce")):
        values = policy_gradient_loss(*inputs, loss=loss, covariant=nowhere)
        assert torch.equal(values, policy_gradient_loss(*inputs, loss=other))


@pytest.mark.parametrize("loss", ["gmpo", "dppo_tv", "dppo_kl", "luspo"])
def test_clip_masks_are_where_the_gradient_is_cut(loss):
    token_logps, old, advantages, mask = samples(rows=40)
    token_logps.requires_grad_()
    surrogate = Surrogate(loss)
    surrogate(token_logps, old, advantages, mask).sum().backward()
    masks = surrogate.clip_masks(token_logps, old, advantages, mask)
    assert masks.low.any()
    assert masks.high.any()
    assert torch.equal(masks.region, mask & (token_logps.grad == 0))
    statistics = surrogate.statistics(token_logps, old, advantages, mask)
    total, weight, _ = statistics["clip_ratio/region_mean"]
    assert total.item() / weight.item() == pytest.approx((masks.low | masks.high).sum().item() / mask.sum().item())


def test_luspo_is_gspo_times_the_length():
    """The sum over tokens is the length times the sequence's clipped term."""
    inputs = samples()
    options = {"epsilon": 2e-3, "epsilon_high": 2.5e-3}
    one, two = (Surrogate("luspo"), Surrogate("grpo", importance_level="sequence", **options))
    mask = inputs[-1]
    total, weight = aggregate(one(*inputs), mask, reduction=one.reduced_by)
    means = two(*inputs).sum(1) / mask.sum(1).clamp(min=1)
    torch.testing.assert_close(total / weight, (means * mask.sum(1)).sum() / mask.any(1).sum())
