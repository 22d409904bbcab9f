"""Policy-gradient losses by scalar loops on ragged masks, with gradients and clip shares."""

from __future__ import annotations

import math

import pytest
import torch

from alignment_modules.functional import (
    LOSS_REDUCTIONS,
    REDUCTIONS,
    Surrogate,
    importance_ratio,
    policy_gradient_loss,
)
from alignment_modules.functional.policy_losses import LOSSES

CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
CLIPPED = ["grpo", "dapo", "bnpo", "dr_grpo"]
LEVELS = [(loss, level) for loss, row in LOSSES.items() for level in row.ranges]


def ranges(loss):
    """The clip ranges that the loss reads."""
    return {"epsilon_high": 0.28} if loss == "cispo" else CLIP


def samples(rows=6, time=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    token_logps = -2 * torch.rand(rows, time, generator=generator, dtype=torch.float64)
    old = token_logps + 0.4 * torch.randn(rows, time, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, time, generator=generator) < 0.7
    mask[2] = False
    return token_logps, old, advantages, mask


def by_loops(token_logps, old, advantages, mask, loss, level, delta):
    result = torch.zeros_like(token_logps)
    for row in range(token_logps.shape[0]):
        kept = [t for t in range(token_logps.shape[1]) if mask[row, t]]
        logs = {t: (token_logps[row, t] - old[row, t]).item() for t in kept}
        if level != "token":
            logs = dict.fromkeys(kept, sum(logs.values()) / max(len(kept), 1))
        advantage = advantages[row].item()
        for t in kept:
            ratio = math.exp(logs[t])
            if loss == "cispo":
                result[row, t] = -min(ratio, 1.28) * advantage * token_logps[row, t]
            else:
                bounded = ratio if delta is None else min(ratio, delta)
                result[row, t] = -min(bounded * advantage, min(max(ratio, 0.8), 1.28) * advantage)
    return result


@pytest.mark.parametrize(("loss", "delta"), [*((loss, d) for loss in CLIPPED for d in (None, 1.4)), ("cispo", None)])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_by_loops(loss, level, delta):
    if level not in LOSSES[loss].ranges:
        return
    inputs = samples()
    result = policy_gradient_loss(*inputs, loss=loss, importance_level=level, delta=delta, **ranges(loss))
    torch.testing.assert_close(result, by_loops(*inputs, loss, level, delta))


@pytest.mark.parametrize("loss", ["dapo", "cispo"])
def test_token_advantages(loss):
    token_logps, old, advantages, mask = samples()
    spread = advantages[:, None].expand_as(token_logps)
    torch.testing.assert_close(
        policy_gradient_loss(token_logps, old, spread, mask, loss=loss),
        policy_gradient_loss(token_logps, old, advantages, mask, loss=loss),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("delta", [None, 1.4])
def test_gradcheck(level, delta):
    token_logps, old, advantages, mask = samples()
    function = lambda x: policy_gradient_loss(  # noqa: E731
        x, old, advantages, mask, loss="grpo", importance_level=level, delta=delta, **CLIP
    )
    assert torch.autograd.gradcheck(function, (token_logps.requires_grad_(),))


def test_cispo_gradient_keeps_the_capped_weight_constant():
    token_logps, old, advantages, mask = samples()
    token_logps.requires_grad_()
    policy_gradient_loss(token_logps, old, advantages, mask, loss="cispo", epsilon_high=0.28).sum().backward()
    weight = (token_logps.detach() - old).exp().clamp(max=1.28)
    torch.testing.assert_close(token_logps.grad, -weight * advantages[:, None] * mask)


@pytest.mark.parametrize(("loss", "level"), LEVELS)
def test_first_update_is_reinforce(loss, level):
    """At a ratio of 1 no loss adds anything to `-A d log p`, be it clipped, gated, weighted or averaged."""
    token_logps, _, advantages, mask = samples()
    token_logps.requires_grad_()
    old, nowhere = token_logps.detach(), torch.zeros_like(mask)
    assert (importance_ratio(token_logps, old, mask, level=level) == 1).all()
    options = {"loss": loss, "importance_level": level, "covariant": nowhere}
    policy_gradient_loss(token_logps, old, advantages, mask, **options).sum().backward()
    torch.testing.assert_close(token_logps.grad, -advantages[:, None] * mask)


def test_two_sided_clip_bounds_negative_advantages():
    token_logps, old = torch.tensor([[0.0]]), torch.tensor([[-3.0]])
    advantage, mask = torch.tensor([-1.0]), torch.ones(1, 1)
    assert policy_gradient_loss(token_logps, old, advantage, mask).item() == pytest.approx(math.exp(3), rel=1e-6)
    assert policy_gradient_loss(token_logps, old, advantage, mask, delta=4.0).item() == 4


@pytest.mark.parametrize(("loss", "level"), LEVELS)
def test_extremes_and_rubbish_outside_the_mask(loss, level):
    token_logps = torch.tensor([[-1e4, 0.0, -1.0], [0.0, -1e4, -1.0]]).requires_grad_()
    old = torch.tensor([[0.0, -1e4, torch.nan], [-1e4, 0.0, torch.inf]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    for advantages in (torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])):
        options = {"loss": loss, "importance_level": level, "covariant": mask.bool()}
        losses = policy_gradient_loss(token_logps, old, advantages, mask, **options)
        (gradient,) = torch.autograd.grad(losses.sum(), token_logps)
        assert torch.isfinite(losses).all()
        assert torch.isfinite(gradient).all()
        assert (losses[:, 2] == 0).all()
        assert (gradient[:, 2] == 0).all()


def test_old_policy_gets_no_gradient():
    token_logps, old, advantages, mask = samples()
    policy_gradient_loss(token_logps.requires_grad_(), old.requires_grad_(), advantages, mask).sum().backward()
    assert old.grad is None


def test_clip_masks_are_where_the_gradient_is_cut():
    token_logps, old, advantages, mask = samples(rows=40)
    token_logps.requires_grad_()
    policy_gradient_loss(token_logps, old, advantages, mask, loss="grpo", **CLIP).sum().backward()
    masks = Surrogate(loss="grpo", **CLIP).clip_masks(token_logps, old, advantages, mask)
    assert masks.low.any()
    assert masks.high.any()
    assert torch.equal(masks.region, mask & (token_logps.grad == 0))
    assert torch.equal(masks.region, masks.low | masks.high)
    assert not (masks.low & masks.high).any()


def test_clip_statistics_by_loops():
    token_logps, old, advantages, mask = samples(rows=40)
    masks = Surrogate(**CLIP).clip_masks(token_logps, old, advantages, mask)
    statistics = Surrogate(**CLIP).statistics(token_logps, old, advantages, mask)
    for name in ("low", "high", "region"):
        total, weight, kind = statistics[f"clip_ratio/{name}_mean"]
        assert kind == "mean"
        assert total.item() == getattr(masks, name).sum().item()
        assert weight.item() == mask.sum().item()
    rows = [row for row in range(40) if mask[row].any()]
    lows = [masks.low[row][mask[row]].double().mean().item() for row in rows]
    highs = [masks.high[row][mask[row]].double().mean().item() for row in rows]
    assert statistics["clip_ratio/low_min"][0].item() == pytest.approx(min(lows))
    assert statistics["clip_ratio/high_max"][0].item() == pytest.approx(max(highs))
    total, weight, _ = statistics["importance_ratio/mean"]
    assert (total / weight).item() == pytest.approx((token_logps - old)[mask].exp().mean().item())


def test_clip_statistics_of_cispo():
    token_logps, old, advantages, mask = samples(rows=40)
    statistics = Surrogate(loss="cispo", epsilon_high=0.28).statistics(token_logps, old, advantages, mask)
    total, weight, _ = statistics["cispo_clip_ratio"]
    assert (total / weight).item() == pytest.approx(((token_logps - old)[mask].exp() > 1.28).double().mean().item())


def test_without_rows():
    empty = torch.zeros(0, 4)
    assert policy_gradient_loss(empty, empty, torch.zeros(0), empty).shape == (0, 4)
    statistics = Surrogate().statistics(empty, empty, torch.zeros(0), empty)
    assert statistics["clip_ratio/low_mean"][1] == 0
    assert statistics["clip_ratio/low_min"][0] == math.inf


def test_every_loss_has_a_known_reduction():
    assert set(LOSS_REDUCTIONS.values()) <= set(REDUCTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "ppo"}, "loss must be one of 'grpo', .*, got 'ppo'"),
        ({"importance_level": "batch"}, "importance_level must be one of 'token', 'sequence', .*, got 'batch'"),
        ({"importance_level": "token", "loss": "luspo"}, "importance_level='token': loss='luspo' takes 'sequence'"),
        ({"epsilon": 0.2, "loss": "cispo"}, "epsilon has no effect with loss='cispo' and must be None, got 0.2"),
        ({"epsilon": 0.2, "loss": "sapo"}, "epsilon has no effect with loss='sapo'"),
        ({"epsilon_high": 0.2, "loss": "vespo"}, "epsilon_high has no effect with loss='vespo'"),
        ({"delta": 2.0, "loss": "gmpo"}, "delta has no effect with loss='gmpo'"),
        ({"loss_options": {"k_pos": 2.0}}, "loss_options={'k_pos': 2.0}: loss='dapo' has none"),
        (
            {"loss_options": {"k_pos": 2.0}, "loss": "sapo"},
            "loss_options={'k_pos': 2.0}: loss='sapo' has 'temperature_pos', 'temperature_neg'",
        ),
        (
            {"loss_options": {"temperature_pos": 0.0}, "loss": "sapo"},
            "loss_options={'temperature_pos': 0.0} must be a finite number > 0",
        ),
        (
            {"loss_options": {"covariance_low": 6.0}, "loss": "clip_cov"},
            "covariance_low=6 must be below covariance_high=5",
        ),
        ({"epsilon": -0.1}, "epsilon=-0.1 must be a finite number from 0 to 1"),
        ({"epsilon_high": -0.1}, "epsilon_high=-0.1 must be a finite number of 0 or more"),
        ({"delta": 1.1}, "delta must be > 1 \\+ epsilon_high = 1.2, got 1.1"),
        ({"delta": 2.0, "loss": "cispo"}, "delta has no effect with loss='cispo'"),
    ],
)
def test_refuses(change, message):
    for call in (Surrogate, lambda **k: policy_gradient_loss(*samples(), **k)):
        with pytest.raises(ValueError, match=message):
            call(**change)


def test_refuses_reductions():
    with pytest.raises(ValueError, match=r"reduction must be one of 'token_mean', .*, got 'mean'"):
        Surrogate(reduction="mean")
    with pytest.raises(ValueError, match="reduction='token_mean': loss='gmpo' is one of completions, 'sequence_mean_"):
        Surrogate(loss="gmpo", reduction="token_mean")
    assert Surrogate(loss="grpo", reduction="token_mean").reduced_by == Surrogate(loss="dapo").reduced_by


@pytest.mark.parametrize("loss", ["clip_cov", "kl_cov"])
def test_covariant_tokens_must_be_given(loss):
    with pytest.raises(ValueError, match="covariant=None"):
        policy_gradient_loss(*samples(), loss=loss)


def test_refuses_shapes():
    token_logps, old, advantages, mask = samples()
    with pytest.raises(ValueError, match=r"advantages must be .* \(6, 8\), got \(5, 8\)"):
        policy_gradient_loss(token_logps, old, advantages[:5], mask)
    with pytest.raises(ValueError, match="mask must have the shape of token_logps"):
        policy_gradient_loss(token_logps, old, advantages, mask[:, 1:])


def test_cispo_has_a_cap_of_its_own():
    """Its default is a margin of 4.0: a cap of 1.2 would cut the very tokens that it is made to keep."""
    ratios = torch.tensor([[1.5, 4.0, 7.0]], dtype=torch.float64)
    old, mask = torch.zeros_like(ratios), torch.ones(1, 3)
    token_logps = ratios.log().requires_grad_()
    policy_gradient_loss(token_logps, old, torch.ones(1), mask, loss="cispo").sum().backward()
    torch.testing.assert_close(token_logps.grad, -ratios.clamp(max=5.0))
    total, _, _ = Surrogate(loss="cispo").statistics(ratios.log(), old, torch.ones(1), mask)["cispo_clip_ratio"]
    assert total == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "dapo, token-level ratio clipped to [0.8, 1.2]"),
        (
            {"loss": "grpo", "epsilon": 0.2, "epsilon_high": 0.28, "delta": 4.0, "importance_level": "sequence"},
            "grpo, sequence-level ratio clipped to [0.8, 1.28], at most 4.0 where the advantage is negative",
        ),
        ({"loss": "grpo", "importance_level": "sequence"}, "grpo, sequence-level ratio clipped to [0.9997, 1.0004]"),
        ({"epsilon": 0.1}, "dapo, token-level ratio clipped to [0.9, 1.1]"),
        ({"epsilon_high": 0.28}, "dapo, token-level ratio clipped to [0.8, 1.28]"),
        ({"loss": "luspo"}, "luspo, sequence-level ratio clipped to [0.998, 1.0025]"),
        (
            {"loss": "sapo", "importance_level": "sequence", "loss_options": {"temperature_neg": 2}},
            "sapo, sequence-level ratio through a gate of temperature 1, for negative advantages 2",
        ),
        (
            {"loss": "gmpo", "epsilon": 0.3},
            "gmpo, sequence-level ratio as the geometric mean of its tokens', each clipped to [exp(-0.3), exp(0.3)]",
        ),
        (
            {"loss": "dppo_tv"},
            "dppo_tv, token-level ratio at most 20, masked where the probability fell by more than 0.15 or rose by "
            "more than 0.2",
        ),
        ({"loss": "reinforce"}, "reinforce, token-level ratio without bounds"),
        ({"loss": "cispo"}, "cispo, token-level ratio capped at 5"),
        ({"loss": "cispo", "epsilon_high": 0.2}, "cispo, token-level ratio capped at 1.2"),
    ],
)
def test_says_what_it_is(options, text):
    surrogate = Surrogate(**options)
    assert surrogate.describe() == text
    assert surrogate.reduced_by == LOSS_REDUCTIONS[surrogate.loss]
    inputs = samples()
    assert torch.equal(surrogate(*inputs), policy_gradient_loss(*inputs, **options))
