"""Kept sets of truncated sampling: how they are stored, and the head's numbers over them, against a dense mask."""

import pytest
import torch

from alignment_modules.functional.logprobs import linear_token_scores
from alignment_modules.functional.support import Support

VOCABULARY = 77
ALL_OF = {name: True for name in ("with_entropy", "with_correct", "with_collision", "with_full_logps")}


def masks(positions=30, vocabulary=VOCABULARY, seed=0):
    """Sets of all sizes, none empty: of one token, of a few, of most, and of all."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(positions, 1, generator=generator) ** 3
    mask = torch.rand(positions, vocabulary, generator=generator) < share
    mask[:, 5] = True
    mask[3::10] = True
    return mask


def dense(support, vocabulary=VOCABULARY):
    flat = support.take(torch.arange(support.sizes.numel()))
    return ~flat.excluded(slice(0, len(flat)), vocabulary)


@pytest.mark.parametrize("vocabulary", [7, 64, 77])
def test_a_set_is_what_it_was_made_of(vocabulary):
    mask = masks(vocabulary=vocabulary)
    support = Support.from_mask(mask)
    assert {-1, 0} <= set(support.sizes.tolist())
    assert vocabulary < 33 or (support.sizes > 0).any()
    assert torch.equal(dense(support, vocabulary), mask)
    for part in (slice(0, 0), slice(4, 5), slice(7, 19), slice(29, 30)):
        assert torch.equal(~support.excluded(part, vocabulary), mask[part])


def test_a_position_takes_at_most_a_bit_a_token():
    mask = torch.arange(8000) < torch.tensor([1, 250, 251, 7999, 8000])[:, None]
    for row, size in zip(mask, (4, 1000, 1000, 1000, 0), strict=True):
        support = Support.from_mask(row[None])
        assert support.ids.numel() * 4 + support.bits.numel() == size
        assert torch.equal(dense(support, 8000), row[None])


def test_rows_are_taken_in_any_order_and_more_than_once():
    mask = masks()
    grid = Support.from_mask(mask).take(torch.arange(30).view(6, 5))
    assert grid.shape == (6, 5)
    for rows in (slice(1, 4), torch.tensor([5, 0, 5]), torch.arange(6) % 2 == 0, slice(0, 0)):
        cut = grid[rows]
        assert torch.equal(dense(cut), mask.view(6, 5, -1)[rows].flatten(0, 1))
        assert len(cut) == len(mask.view(6, 5, -1)[rows])
    placed = grid.take(torch.tensor([[29, -1], [3, 0]]))
    expected = torch.stack([mask[29], torch.ones_like(mask[0]), mask[3], mask[0]])
    assert torch.equal(dense(placed), expected)
    assert torch.equal(dense(Support.cat([placed, grid[2:3]])), torch.cat([expected, mask[10:15]]))


def test_the_whole_vocabulary_takes_nothing():
    support = Support.whole((2, 3))
    assert support.shape == (2, 3)
    assert support.ids.numel() == support.bits.numel() == 0
    assert dense(support).all()
    assert torch.equal(dense(Support.cat([support, Support.from_mask(masks())]))[6:], masks())
    assert dense(support[:0].take(torch.tensor([-1]))).all()


def inputs(rows=30, width=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, width), (VOCABULARY, width), (VOCABULARY,))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    weights = masks(rows).double()
    return [one.requires_grad_() for one in drawn], torch.multinomial(weights, 1, generator=generator)[:, 0]


def by_loops(hidden, weight, bias, targets, mask, temperature=1.0, scale=1.0, cap=None):
    """Row by row, from the tokens of the set alone."""
    found = []
    for state, target, kept in zip(hidden, targets, mask, strict=True):
        logits = scale * (weight @ state + bias)
        logits = (logits if cap is None else cap * torch.tanh(logits / cap)) / temperature
        tokens = kept.nonzero()[:, 0]
        p = logits[tokens].exp() / logits[tokens].exp().sum()
        own = p[tokens == target][0]
        entropy, collision = -(p * p.log()).sum(), p.square().sum().log()
        correct = tokens[p.argmax()] == target
        found.append((own.log(), entropy, correct, collision, logits[target] - logits.exp().sum().log()))
    return [torch.stack(values) for values in zip(*found, strict=True)]


SETTINGS = [
    ({}, {}),
    ({"temperature": 0.7, "logit_scale": 1.5, "softcap": 3.0}, {"temperature": 0.7, "scale": 1.5, "cap": 3.0}),
]


@pytest.mark.parametrize(("settings", "same"), SETTINGS, ids=["plain", "capped"])
@pytest.mark.parametrize("max_chunk_bytes", [1, 7 * VOCABULARY * 8, 2**20])
def test_numbers_and_gradients_are_those_of_the_set(settings, same, max_chunk_bytes):
    (hidden, weight, bias), targets = inputs()
    support = Support.from_mask(masks())
    found = linear_token_scores(
        hidden, weight, targets, bias=bias, max_chunk_bytes=max_chunk_bytes, support=support, **ALL_OF, **settings
    )
    expected = by_loops(hidden, weight, bias, targets, masks(), **same)
    ours = (found.token_logps, found.entropy, found.correct, found.collision, found.full_logps)
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
    upstream = torch.randn(3, len(targets), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for asked in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        gradients = [
            torch.autograd.grad(
                sum((w * up * values[i]).sum() for w, up, i in zip(asked, upstream, (0, 1, 4), strict=True)),
                [hidden, weight, bias],
                retain_graph=True,
            )
            for values in (ours, expected)
        ]
        for left, right in zip(*gradients, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-11)


@pytest.mark.parametrize("max_chunk_bytes", [2 * VOCABULARY * 8, 2**20])
def test_gradcheck(max_chunk_bytes):
    (hidden, weight, bias), targets = inputs(rows=5, width=2)
    support = Support.from_mask(masks(5))

    def function(hidden, weight, bias):
        options = {"max_chunk_bytes": max_chunk_bytes, "support": support} | ALL_OF
        found = linear_token_scores(hidden, weight, targets, bias=bias, **options)
        return found.token_logps, found.entropy, found.full_logps

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_the_whole_vocabulary_is_no_support():
    (hidden, weight, bias), targets = inputs()
    one, other = (
        linear_token_scores(hidden, weight, targets, bias=bias, support=support, **ALL_OF)
        for support in (None, Support.whole((30,)))
    )
    assert torch.equal(one.full_logps, one.token_logps)
    some = linear_token_scores(hidden, weight, targets, bias=bias, support=Support.from_mask(masks()), **ALL_OF)
    assert torch.equal(one.full_logps, some.full_logps)
    for left, right in zip(one, other, strict=True):
        assert (left is None and right is None) or torch.allclose(left, right, rtol=0, atol=1e-12)


def test_in_bfloat16_it_reduces_in_float32():
    (hidden, weight, bias), targets = inputs(dtype=torch.bfloat16)
    found = linear_token_scores(hidden, weight, targets, bias=bias, support=Support.from_mask(masks()), **ALL_OF)
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight, bias)]
    expected = by_loops(*exact, targets, masks())
    assert found.token_logps.dtype == found.full_logps.dtype == torch.float32
    torch.testing.assert_close(found.token_logps.double(), expected[0], rtol=0, atol=0.05)
    (found.token_logps.sum() + found.full_logps.sum()).backward()
    (expected[0].sum() + expected[4].sum()).backward()
    assert (hidden.grad.double() - exact[0].grad).norm() < 0.03 * exact[0].grad.norm()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_outside_the_set_stay_outside(scale):
    (hidden, weight, _), targets = inputs(dtype=torch.float32)
    support = Support.from_mask(masks())
    found = linear_token_scores(hidden, weight, targets, logit_scale=scale, support=support, **ALL_OF)
    (found.token_logps.sum() + found.entropy.sum()).backward()
    for tensor in (found.token_logps, found.entropy, hidden.grad, weight.grad):
        assert torch.isfinite(tensor).all()


def test_a_target_outside_its_set_is_impossible():
    (hidden, weight, _), targets = inputs()
    mask = masks()
    mask[0] = False
    mask[0, (int(targets[0]) + 1) % VOCABULARY] = True
    found = linear_token_scores(hidden, weight, targets, support=Support.from_mask(mask))
    assert found.token_logps[0] == -torch.inf
    assert found.token_logps[1:].isfinite().all()


@pytest.mark.parametrize("max_chunk_bytes", [1, 2**20])
def test_without_rows(max_chunk_bytes):
    (hidden, weight, _), targets = inputs(rows=0)
    options = {"max_chunk_bytes": max_chunk_bytes, "support": Support.whole((0,))} | ALL_OF
    linear_token_scores(hidden, weight, targets, **options).token_logps.sum().backward()
    assert (weight.grad == 0).all()


def test_refuses():
    (hidden, weight, _), targets = inputs()
    with pytest.raises(ValueError, match=r"support must be \[30\], one set a target, got shape \(29,\)"):
        linear_token_scores(hidden, weight, targets, support=Support.whole((29,)))
    for name in ("with_normalizer", "with_mean_logp"):
        with pytest.raises(ValueError, match=f"{name}=True is of the whole vocabulary"):
            linear_token_scores(hidden, weight, targets, support=Support.whole((30,)), **{name: True})
