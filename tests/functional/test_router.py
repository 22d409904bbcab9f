"""The load-balancing loss against transformers, a loop over tokens, and closed forms; sums of parts are the whole."""

import pytest
import torch
from torch.autograd import gradcheck

from alignment_modules.functional import expert_counts, load_balancing_loss, router_shares


def logits(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(layers, top_k):
    counts = sum(expert_counts(layer, top_k) for layer in layers)
    shares = router_shares(counts, top_k)
    return torch.cat([load_balancing_loss(layer, shares) for layer in layers]).mean()


def by_hand(layers, top_k):
    """Equations 4 to 6 token by token."""
    rows = [row for layer in layers for row in layer]
    experts = len(rows[0])
    sent, given = [0.0] * experts, [0.0] * experts
    for row in rows:
        weights = row.exp() / row.exp().sum()
        for expert in sorted(range(experts), key=lambda e: -float(row.detach()[e]))[:top_k]:
            sent[expert] += 1 / len(rows)
        given = [before + weight / len(rows) for before, weight in zip(given, weights, strict=True)]
    return experts * sum(share * mean for share, mean in zip(sent, given, strict=True))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_loss_and_gradient_are_the_papers_and_transformers(top_k):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    gradients = []
    for compute in (loss_of, by_hand, lambda layers, k: load_balancing_loss_func(layers, 5, k)):
        layers = tuple(logits(7, 5, seed=seed).requires_grad_() for seed in range(3))
        loss = compute(layers, top_k)
        gradients.append((loss.detach(), *torch.autograd.grad(loss, layers)))
    for other in gradients[1:]:
        for ours, theirs in zip(gradients[0], other, strict=True):  # shares, and all of transformers', are float32
            torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-7)


def test_parts_add_up_to_the_whole_and_their_means_do_not():
    whole = logits(12, 4)
    counts = expert_counts(whole, 2)
    assert torch.equal(counts, sum(expert_counts(part, 2) for part in whole.split([1, 6, 0, 5])))
    shares = router_shares(counts, 2)
    parts = [load_balancing_loss(part, shares).sum() for part in whole.split([1, 6, 0, 5])]
    torch.testing.assert_close(sum(parts) / 12, loss_of([whole], 2))
    means = torch.stack([loss_of([part], 2) for part in whole.split([6, 6])]).mean()
    assert abs(float(means - loss_of([whole], 2))) > 1e-3


def test_closed_forms():
    even = torch.zeros(6, 4)
    assert float(loss_of([even], 3)) == pytest.approx(3)  # indifferent: top_k, whoever is chosen
    one = torch.zeros(6, 4).index_fill_(1, torch.tensor([2]), 80.0)
    assert float(loss_of([one], 1)) == pytest.approx(4)  # all to one: the number of experts
    assert float(router_shares(expert_counts(logits(9, 4), 3), 3).sum()) == pytest.approx(3)
    assert torch.equal(router_shares(expert_counts(logits(0, 4), 3), 3), torch.zeros(4))


def test_shapes_types_and_gradient():
    values = logits(2, 3, 5).requires_grad_()
    counts = expert_counts(values, 2)
    assert counts.dtype == torch.float32
    assert not counts.requires_grad
    shares = router_shares(counts, 2)
    assert load_balancing_loss(values, shares).shape == (2, 3)
    assert load_balancing_loss(values.bfloat16(), shares).dtype == torch.float32
    assert gradcheck(lambda x: load_balancing_loss(x, shares), values)
    learnt = shares.clone().requires_grad_()
    load_balancing_loss(values, learnt).sum().backward()
    assert learnt.grad is None


@pytest.mark.parametrize("top_k", [0, 6])
def test_refuses(top_k):
    with pytest.raises(ValueError, match=rf"top_k={top_k} .* 1 to .* 5"):
        expert_counts(logits(3, 5), top_k)
    with pytest.raises(ValueError, match=r"shares has shape \(4,\); expected \(5,\)"):
        load_balancing_loss(logits(3, 5), torch.ones(4))
