"""Losses and gradients against numbers that TRL 1.16 computed on the same inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignment_modules.functional import (
    CORRECTIONS,
    LOSS_REDUCTIONS,
    aggregate,
    kl_penalty,
    length_desensitized_logps,
    policy_gradient_loss,
    preference_loss,
    top_quantile,
)

GOLDEN = Path(__file__).parents[1] / "golden"
PREFERENCE = json.loads((GOLDEN / "preference.json").read_text())
POLICY_GRADIENT = json.loads((GOLDEN / "policy_gradient.json").read_text())
POLICY_LOSSES = json.loads((GOLDEN / "policy_losses.json").read_text())  # of the inputs of POLICY_GRADIENT
DIVERGENCES = {"js_divergence": "js"}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def check(loss, token_logps, mask, case):
    (gradient,) = torch.autograd.grad(loss, token_logps)
    # TRL's log-probabilities are 0 outside the completion, and its gradient there leads nowhere.
    expected = torch.tensor(case["grad_logps"]) * mask
    torch.testing.assert_close(loss.item(), case["loss"], **TOLERANCE)
    torch.testing.assert_close(gradient, expected, **TOLERANCE)
    assert expected.any()


@pytest.mark.parametrize("name", PREFERENCE["cases"])
def test_preference(name):
    case, inputs = PREFERENCE["cases"][name], PREFERENCE["inputs"]
    options = case["kw"]
    mask = torch.tensor(inputs["completion_mask"])[:, 1:].bool()
    lengths = mask.sum(1)
    policy = torch.tensor(inputs["per_token_logps"]).requires_grad_()
    reference = torch.tensor(inputs["ref_per_token_logps"])
    shared = lengths.view(2, 4).amin(0).repeat(2)
    policy_sums, reference_sums = (
        length_desensitized_logps(logps, mask, shared, ld_alpha=options.get("ld_alpha", 1.0))
        for logps in (policy, reference)
    )
    (loss_name,) = options["loss_type"]
    # TRL ignores label smoothing for its sigmoid loss.
    smoothing = 0.0 if loss_name == "sigmoid" else options.get("label_smoothing", 0.0)
    losses = preference_loss(
        *policy_sums.chunk(2),
        *reference_sums.chunk(2),
        loss=loss_name,
        beta=options["beta"],
        label_smoothing=smoothing,
        chosen_lengths=lengths[:4],
        rejected_lengths=lengths[4:],
        f_divergence=DIVERGENCES.get(options.get("f_divergence_type"), "reverse_kl"),
    )
    assert losses.shape == (4,)
    check(losses.mean(), policy, mask, case)


@pytest.mark.parametrize("name", POLICY_GRADIENT["cases"])
def test_policy_gradient(name):
    case, inputs = POLICY_GRADIENT["cases"][name], POLICY_GRADIENT["inputs"]
    options = case["kw"]
    mask = torch.tensor(inputs["completion_mask"])
    policy = torch.tensor(inputs["per_token_logps"]).requires_grad_()
    old = policy.detach() if options.get("on_policy") else torch.tensor(inputs["old_per_token_logps"])
    # TRL's cap for "cispo" is epsilon_high itself, ours is the paper's 1 + epsilon_high.
    high = options.get("eps_high", 0.2) - (options["loss_type"] == "cispo")
    values = policy_gradient_loss(
        policy,
        old,
        torch.tensor(inputs["advantages"]),
        mask,
        loss=options["loss_type"],
        epsilon=None if options["loss_type"] == "cispo" else 0.2,
        epsilon_high=high,
        importance_level=options.get("level", "token"),
        delta=options.get("delta"),
    )
    if options.get("beta"):
        estimator = "k3+score" if options.get("bias_kl", True) else "k3"
        reference = torch.tensor(inputs["ref_per_token_logps"])
        values = values + options["beta"] * kl_penalty(policy, reference, estimator=estimator, old_token_logps=old)
    total, weight = aggregate(values, mask, reduction=LOSS_REDUCTIONS[options["loss_type"]], max_length=8)
    check(total / weight, policy, mask, case)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_losses(name):
    case, inputs = POLICY_LOSSES[name], POLICY_GRADIENT["inputs"]
    options = case["kw"]
    loss, mask, advantages = options["loss_type"], torch.tensor(inputs["completion_mask"]), inputs["advantages"]
    policy, advantages = torch.tensor(inputs["per_token_logps"]).requires_grad_(), torch.tensor(advantages)
    high = options["eps_high"] - (loss == "cispo")
    clip = {"epsilon_high": high} if loss == "cispo" else {"epsilon": options["eps"], "epsilon_high": high}
    level = {"importance_level": options["level"]} if loss not in ("gmpo", "vespo") else {}
    clip = {} if loss in ("sapo", "vespo") else clip
    old = torch.tensor(inputs["old_per_token_logps"])
    values = policy_gradient_loss(policy, old, advantages, mask, loss=loss, **level, **clip)
    if "off_policy_mask_threshold" in options:
        gate = replace(CORRECTIONS["opsm"], high=options["off_policy_mask_threshold"])
        weights = gate(torch.tensor(inputs["sampling_per_token_logps"]), policy, advantages, mask)
        assert 0 < (weights == 0)[mask.bool()].double().mean() < 1
        values = values * weights
    if "top_entropy_quantile" in options:
        kept = torch.zeros_like(mask, dtype=torch.bool)
        entropies = torch.tensor(inputs["entropies"])[mask.bool()]
        kept[mask.bool()] = top_quantile(entropies, options["top_entropy_quantile"])
        values = values * kept
    total, weight = aggregate(values, mask, reduction=LOSS_REDUCTIONS[loss], max_length=8)
    check(total / weight, policy, mask, case)
