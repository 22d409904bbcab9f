"""pass@k against counted subsets and closed forms."""

import itertools
import math

import pytest
import torch

from alignment_modules.evaluation.metrics import pass_at_k


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(samples):
    for hits, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        row = [1] * hits + [0] * (samples - hits)
        subsets = list(itertools.combinations(row, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(torch.tensor([row]), k).item() == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_large_numbers():
    hits = torch.zeros(3, 2000, dtype=torch.bool)
    hits[1, :20] = True
    hits[2] = True
    closed = 1 - math.comb(1980, 100) / math.comb(2000, 100)
    assert pass_at_k(hits, 100).tolist() == pytest.approx([0, closed, 1], rel=1e-6)


@pytest.mark.parametrize(
    ("correct", "k", "message"),
    [
        (torch.ones(2, 2), 0, r"k=0 must lie within \[1, 2\]"),
        (torch.ones(2, 2), 3, r"k=3 must lie within \[1, 2\]"),
        (torch.ones(2), 1, r"correct has shape \(2,\)"),
        (torch.tensor([[0.5]]), 1, "correct must hold 0 and 1 only"),
    ],
)
def test_mistakes(correct, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(correct, k)
