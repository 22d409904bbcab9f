"""Losses on single completions: constants and formulas by hand; which rows KTO holds against one another."""

from __future__ import annotations

import math
import random

import pytest
import torch

from alignment_modules.functional import mismatched, mismatched_completions, unpaired_loss

BETA = 0.3
RATIOS, LABELS = torch.tensor([2.0, -1, 3, 0.5], dtype=torch.float64), torch.tensor([1, 0, 1, 0])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def unpaired(ratios=RATIOS, labels=LABELS, kl=0.5, **options):
    return unpaired_loss(ratios - 7, torch.full_like(ratios, -7), labels, kl, **options)


def test_kto_constants():
    mismatched = torch.tensor([4.0, 2, -3, -1])
    kl = mismatched.mean().clamp(min=0)
    assert kl == 0.5
    assert unpaired(kl=kl).mean().item() == pytest.approx(0.4657410, abs=5e-8)
    halves = [unpaired(RATIOS[part], LABELS[part], kl) for part, kl in ((slice(2), 3.0), (slice(2, 4), 0.0))]
    assert torch.cat(halves).mean().item() == pytest.approx(0.466087, abs=5e-7)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_unpaired_by_hand(loss):
    z = 0.5 if loss == "kto" else 0.0
    expected = [
        1.5 * (1 - sigmoid(BETA * (r - z))) if good else 0.7 * (1 - sigmoid(BETA * (z - r)))
        for r, good in zip(RATIOS.tolist(), LABELS.tolist(), strict=True)
    ]
    result = unpaired(loss=loss, beta=BETA, desirable_weight=1.5, undesirable_weight=0.7)
    assert result.tolist() == pytest.approx(expected, rel=1e-9)
    function = lambda x: unpaired(x, loss=loss, beta=BETA)  # noqa: E731
    assert torch.autograd.gradcheck(function, (RATIOS.clone().requires_grad_(),))


def test_unpaired_constants_get_no_gradient():
    reference, kl = torch.zeros(4, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    policy = torch.zeros(4, requires_grad=True)
    unpaired_loss(policy, reference, LABELS, kl).sum().backward()
    assert policy.grad is not None
    assert reference.grad is None
    assert kl.grad is None


def test_unpaired_far_away_stays_finite():
    ratios = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    losses = unpaired(ratios)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0, 0.0, 0.0] or torch.isfinite(losses).all()
    assert torch.isfinite(ratios.grad).all()


def test_unpaired_refuses():
    with pytest.raises(ValueError, match="loss='kpo' must be 'kto' or 'apo_zero_unpaired'"):
        unpaired(loss="kpo")
    with pytest.raises(ValueError, match="loss='kto' needs kl"):
        unpaired(kl=None)
    with pytest.raises(ValueError, match="labels must have the shape of policy_logps"):
        unpaired(labels=LABELS[:3])
    with pytest.raises(ValueError, match="desirable_weight=-1 must be"):
        unpaired(desirable_weight=-1)
    assert torch.equal(unpaired(kl=None, loss="apo_zero_unpaired"), unpaired(loss="apo_zero_unpaired"))


def by_search(prompts, index):
    rows = [row for row in range(len(prompts)) if prompts[row] is not None]
    rows = sorted(rows, key=lambda row: index[row])
    found = [-1] * len(prompts)
    for place, row in enumerate(rows):
        for back in range(1, len(rows)):
            if prompts[rows[place - back]] != prompts[row]:
                found[row] = rows[place - back]
                break
    return found


@pytest.mark.parametrize("seed", range(50))
def test_by_search(seed):
    chance = random.Random(seed)
    prompts = [chance.choice(["a", "b", "b", None]) for _ in range(chance.randrange(9))]
    index = chance.sample(range(100), len(prompts))
    assert mismatched(prompts, index) == by_search(prompts, index)
    assert mismatched(prompts) == by_search(prompts, range(len(prompts)))


@pytest.mark.parametrize("prompts", [[], ["a"], ["a", "a", None], [None, None]])
def test_one_prompt_has_no_other(prompts):
    assert mismatched(prompts) == [-1] * len(prompts)


def test_the_order_of_the_index_counts():
    assert mismatched(["a", "b", "c"], [0, 1, 2]) == [2, 0, 1]
    assert mismatched(["c", "a", "b"], [2, 0, 1]) == [2, 0, 1]


def test_mismatched_completions_by_hand():
    """Padding on either side tells no prompts apart; a pair longer than the limit loses its completion's end."""
    prompts, prompt_mask = torch.tensor([[0, 5], [5, 0], [6, 7]]), torch.tensor([[0, 1], [1, 0], [1, 1]])
    completions, mask = torch.tensor([[1, 2, 3], [4, 0, 0], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    written = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0]])
    ids, kept, scored = mismatched_completions(prompts, prompt_mask, completions, mask, written, index=[2, 0, 1])
    assert ids.tolist() == [[8, 9, 0], [8, 9, 0], [4, 0, 0]]  # in the order of the index: row 1, row 2, row 0
    assert kept.long().tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0]]
    ids, kept, scored = mismatched_completions(
        prompts, prompt_mask, completions, mask, written, index=[0, 2, 1], limit=3
    )
    assert ids[2].tolist() == [1, 2, 3]
    assert kept[2].tolist() == [True, False, False]
    assert not scored[2].any()
    same = mismatched_completions(prompts[:2], prompt_mask[:2], completions[:2], mask[:2], written[:2])
    assert not same[1].any()
