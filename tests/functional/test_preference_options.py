"""Preference losses together: several at once, labels, margins, DPO-Positive, sums for IPO."""

from __future__ import annotations

import math

import pytest
import torch

from alignment_modules.functional import BATCH_COUPLED_LOSSES, PREFERENCE_LOSSES, Preference, preference_loss

ROWWISE = [name for name in PREFERENCE_LOSSES if name not in BATCH_COUPLED_LOSSES]
DIFFERENCES = ["sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "exo_pair", "discopop"]
SMOOTHING = {"exo_pair": 0.05, "robust": 0.1}
LENGTHS = {"chosen_lengths": torch.tensor([3, 7, 1, 5]), "rejected_lengths": torch.tensor([4, 2, 6, 5])}
BETA = 0.3


def log_probs(pairs=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [-20 * torch.rand(pairs, generator=generator, dtype=torch.float64) for _ in range(4)]


def options(loss):
    return {"loss": loss, "beta": BETA, "label_smoothing": SMOOTHING.get(loss, 0.0)}


def swapped(logps):
    return logps[1], logps[0], logps[3], logps[2]


def test_several_losses_are_their_weighted_sum():
    logps = log_probs()
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    found = preference_loss(*logps, loss=list(weights), weights=list(weights.values()), beta=BETA, **LENGTHS)
    parts = [weight * preference_loss(*logps, loss=name, beta=BETA, **LENGTHS) for name, weight in weights.items()]
    torch.testing.assert_close(found, sum(parts))
    unweighted = preference_loss(*logps, loss=["sigmoid", "hinge"], beta=BETA)
    torch.testing.assert_close(
        unweighted, sum(preference_loss(*logps, loss=n, beta=BETA) for n in ("sigmoid", "hinge"))
    )


def test_options_of_a_list_reach_the_losses_that_have_them():
    logps = log_probs()
    found = preference_loss(*logps, loss=["sigmoid", "hinge"], beta=BETA, label_smoothing=0.1)
    parts = preference_loss(*logps, beta=BETA, label_smoothing=0.1), preference_loss(*logps, loss="hinge", beta=BETA)
    torch.testing.assert_close(found, sum(parts))
    found = preference_loss(*logps, loss=["sigmoid", "bco_pair"], beta=BETA, f_divergence="js")
    parts = preference_loss(*logps, beta=BETA, f_divergence="js"), preference_loss(*logps, loss="bco_pair", beta=BETA)
    torch.testing.assert_close(found, sum(parts))


@pytest.mark.parametrize("loss", ROWWISE)
def test_labels_give_the_expected_loss(loss):
    logps = log_probs()
    lengths = {"chosen_lengths": LENGTHS["rejected_lengths"], "rejected_lengths": LENGTHS["chosen_lengths"]}
    labels = torch.tensor([1.0, 0.0, 0.25, 0.5], dtype=torch.float64)
    found = preference_loss(*logps, **options(loss), **LENGTHS, labels=labels)
    straight = preference_loss(*logps, **options(loss), **LENGTHS)
    turned = preference_loss(*swapped(logps), **options(loss), **lengths)
    torch.testing.assert_close(found, labels * straight + (1 - labels) * turned)
    torch.testing.assert_close(found[0], straight[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], turned[1], rtol=0, atol=0)


def test_a_label_is_label_smoothing_of_one_pair():
    logps = log_probs()
    found = preference_loss(*logps, beta=BETA, labels=torch.full((4,), 0.9, dtype=torch.float64))
    torch.testing.assert_close(found, preference_loss(*logps, beta=BETA, label_smoothing=0.1))


@pytest.mark.parametrize("loss", DIFFERENCES)
def test_margins_move_the_difference(loss):
    """A margin is what the chosen completion's log-probability would have to fall by for the same loss."""
    logps, margins = log_probs(), torch.tensor([0.0, 0.5, 2.0, -1.0], dtype=torch.float64)
    found = preference_loss(*logps, **options(loss), **LENGTHS, margins=margins)
    scale = LENGTHS["chosen_lengths"] if loss in ("ipo", "sigmoid_norm") else 1.0
    lowered = logps[0] - scale * margins / BETA
    torch.testing.assert_close(found, preference_loss(lowered, *logps[1:], **options(loss), **LENGTHS))


def test_margin_of_dpo_by_hand():
    zero = torch.zeros(1)
    found = preference_loss(zero, zero, zero, zero, beta=BETA, margins=torch.ones(1))
    assert found.item() == pytest.approx(math.log1p(math.e))


def test_dpo_positive_by_hand():
    chosen, rejected, *reference = (torch.tensor([value]) for value in (-5.0, -9.0, -3.0, -4.0))
    h = (-5 + 3) - (-9 + 4) - 7.0 * max(0, -3 + 5)
    found = preference_loss(chosen, rejected, *reference, beta=BETA, dpop_coef=7.0)
    assert found.item() == pytest.approx(math.log1p(math.exp(-BETA * h)))
    likelier = preference_loss(torch.tensor([-2.0]), rejected, *reference, beta=BETA, dpop_coef=7.0)
    assert likelier.item() == preference_loss(torch.tensor([-2.0]), rejected, *reference, beta=BETA).item()


@pytest.mark.parametrize("loss", DIFFERENCES)
@pytest.mark.parametrize("more", [{"dpop_coef": 2.0}, {"labels": torch.full((4,), 0.7, dtype=torch.float64)}])
def test_gradcheck(loss, more):
    chosen, rejected, *reference = log_probs(seed=3)
    function = lambda a, b: preference_loss(a, b, *reference, **options(loss), **LENGTHS, **more)  # noqa: E731
    assert torch.autograd.gradcheck(function, (chosen.requires_grad_(), rejected.requires_grad_()))


def test_ipo_of_sums_is_ipo_without_lengths():
    logps = log_probs()
    found = preference_loss(*logps, loss="ipo", beta=BETA, ipo_logps="sum", **LENGTHS)
    torch.testing.assert_close(found, preference_loss(*logps, loss="ipo", beta=BETA), rtol=0, atol=0)
    assert not torch.allclose(found, preference_loss(*logps, loss="ipo", beta=BETA, **LENGTHS))


@pytest.mark.parametrize("loss", [*DIFFERENCES, "apo_zero", "aot", "aot_unpaired"])
def test_identical_sides_leave_their_completion_alone(loss):
    shared, _, reference, _ = log_probs()
    shared.requires_grad_()
    same = {name: LENGTHS["chosen_lengths"] for name in LENGTHS}
    preference_loss(shared, shared, reference, reference, **options(loss), **same).sum().backward()
    assert shared.grad.abs().max() < 1e-12


# Losses whose expectation under a Bradley-Terry judge is least where `log p - log p_ref = r / beta`.
@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "exo_pair", "robust"])
def test_gradient_vanishes_at_the_bradley_terry_optimum(loss):
    rewards = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    reference = torch.log_softmax(torch.tensor([0.1, 1.5, -0.4, 0.0], dtype=torch.float64), 0)
    logits = (reference + rewards / BETA).requires_grad_()
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    labels = torch.sigmoid(rewards[first] - rewards[second])
    if loss == "robust":  # labels that are flipped with its probability: the loss takes that off again
        labels = 0.9 * labels + 0.1 * (1 - labels)
    if loss == "exo_pair":  # its target is one label of many, smoothed: the pair's own
        total = torch.zeros((), dtype=torch.float64)
        for a, b, label in zip(first.tolist(), second.tolist(), labels.tolist(), strict=True):
            if label > 0.5:
                total = total + preference_loss(
                    logits[a, None], logits[b, None], reference[a, None], reference[b, None],
                    loss=loss, beta=BETA, label_smoothing=1 - label,
                ).sum()  # fmt: skip
    else:
        total = preference_loss(
            logits[first], logits[second], reference[first], reference[second],
            loss=loss, beta=BETA, label_smoothing=SMOOTHING.get(loss, 0.0), labels=labels,
        ).sum()  # fmt: skip
    total.backward()
    assert logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": []}, "loss=.. names no loss"),
        ({"loss": ["sigmoid", "dpo"]}, "loss must be one of .* got 'dpo'"),
        ({"weights": [1.0]}, "must be one weight for each of several losses, got loss='sigmoid'"),
        ({"loss": ["sigmoid", "sft"], "weights": [1.0]}, r"loss_weights=\[1.0\] must be one weight for each"),
        ({"loss": ["sigmoid", "sft"], "weights": [1.0, -1.0]}, "-1.0 must be a number of 0 or more"),
        ({"loss": ["sigmoid", "sft"], "weights": [0, 0]}, "one of them must be above 0"),
        ({"loss": ["hinge", "sft"], "label_smoothing": 0.1}, r"label_smoothing must be 0 for loss=\['hinge', 'sft'\]"),
        ({"loss": "sft", "dpop_coef": 1.0}, "dpop_coef must be 0 for loss='sft'"),
        ({"dpop_coef": 1.0, "f_divergence": "js"}, "leave f_divergence at 'reverse_kl', got 'js'"),
        ({"alpha": 0.3}, "alpha=0.3 is the coefficient of f_divergence='alpha', got f_divergence='reverse_kl'"),
        ({"discopop_tau": 0.5}, "discopop_tau must be 0.05 for loss='sigmoid'"),
        ({"ipo_logps": "sum"}, "ipo_logps must be 'mean' for loss='sigmoid'"),
        ({"loss": ["aot", "sft"]}, "aot, aot_unpaired sort the pairs of a step and stand alone"),
    ],
)
def test_refuses_options(change, message):
    with pytest.raises(ValueError, match=message):
        Preference(**({"loss": "sigmoid", "beta": 0.1} | change))


def test_refuses_columns_that_mean_nothing():
    logps, ones = log_probs(), torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="label: loss='aot' sorts the pairs"):
        preference_loss(*logps, loss="aot", labels=ones)
    with pytest.raises(ValueError, match="margin: loss='nca_pair' takes no difference"):
        preference_loss(*logps, loss="nca_pair", margins=ones)
    with pytest.raises(ValueError, match="label and margin contradict each other"):
        preference_loss(*logps, labels=ones, margins=ones)
    with pytest.raises(ValueError, match="margins must have the shape of policy_chosen_logps"):
        preference_loss(*logps, margins=ones[:2])
