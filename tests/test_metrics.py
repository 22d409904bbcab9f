"""Metrics against closed forms, whatever the split into batches and processes."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

from alignment_modules.metrics import ExactMatch, PassAtK, Perplexity, TokenWeightedMean, pass_at_k


def test_token_weighted_mean_does_not_depend_on_the_batches():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 5, generator=generator)
    mask = torch.rand(12, 5, generator=generator) > 0.6
    expected = values[mask].double().mean().item()
    for size in (1, 3, 5, 12):
        metric = TokenWeightedMean()
        for start in range(0, 12, size):
            metric.update(values[start : start + size], mask[start : start + size])
        assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


def test_masked_entries_and_empty_batches_add_nothing():
    metric = TokenWeightedMean()
    metric.update(torch.tensor([[2.0, math.nan], [math.inf, math.nan]]), torch.tensor([[1, 0], [0, 0]]))
    metric.update(torch.full((2, 2), math.nan), torch.zeros(2, 2))
    metric.update(torch.zeros(0, 3), torch.zeros(0, 3))
    assert metric.compute().item() == 2.0
    metric.update(torch.tensor([5.0, 5.0]), torch.tensor([0.5, 1.5]))
    assert metric.compute().item() == 4.0
    metric.update(torch.tensor(7.0))
    assert metric.compute().item() == 4.75
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute().isnan()


def test_long_sums_keep_their_digits():
    metric = TokenWeightedMean()
    for _ in range(200):
        metric.update(torch.full((100_000,), 0.1))
    assert metric.compute().item() == pytest.approx(0.1, rel=1e-6)


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    logps = torch.log_softmax(torch.zeros(3, 4, 17), -1)[..., 0]
    metric = Perplexity()
    metric.update(logps, torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]))
    assert metric.compute().item() == pytest.approx(17.0, rel=1e-6)
    metric.update(torch.full((1, 4), -1.0))
    assert metric.compute().item() == pytest.approx(math.exp((4 * math.log(17) + 4) / 8), rel=1e-6)


def test_exact_match():
    metric = ExactMatch(ignore_case=True)
    metric.update(["Paris ", "rome"], ["paris", ["Rome", "Roma"]])
    metric.update(["x", "y"], ["z", None])
    assert metric.compute().item() == pytest.approx(2 / 3)
    assert ExactMatch(extract=r"=(\d+)")(["1+1=2"], ["2"]).item() == 1.0


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(samples):
    for hits, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        row = [1] * hits + [0] * (samples - hits)
        subsets = list(itertools.combinations(row, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(torch.tensor([row]), k).item() == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_metric_and_large_numbers():
    metric = PassAtK(100)
    hits = torch.zeros(3, 2000, dtype=torch.bool)
    hits[1, :20] = True
    hits[2] = True
    metric.update(hits[:1])
    metric.update(hits[1:])
    closed = 1 - math.comb(1980, 100) / math.comb(2000, 100)
    assert metric.compute().item() == pytest.approx((0 + closed + 1) / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: PassAtK(0), "k=0 must be an integer from 1"),
        (lambda: PassAtK(3).update(torch.ones(2, 2)), r"k=3 must lie within \[1, 2\]"),
        (lambda: PassAtK(1).update(torch.ones(2)), r"correct has shape \(2,\)"),
        (lambda: PassAtK(1).update(torch.tensor([[0.5]])), "correct must hold 0 and 1 only"),
        (lambda: TokenWeightedMean().update(torch.ones(2, 2), torch.ones(2)), r"mask has shape \(2,\); .* \(2, 2\)"),
        (lambda: ExactMatch().update(["a"], ["a", "b"]), "expected has 2 entries for 1 texts"),
    ],
)
def test_mistakes(act, message):
    with pytest.raises(ValueError, match=message):
        act()


TWO_RANKS = """
import sys
import torch
from alignment_modules.metrics import ExactMatch, PassAtK, Perplexity, TokenWeightedMean

def main(rank, store, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mean, perplexity, match, passed = TokenWeightedMean(), Perplexity(), ExactMatch(), PassAtK(2)
    rows = [[1.0, 2.0, 3.0], [10.0]][rank]
    mean.update(torch.tensor(rows))
    perplexity.update(-torch.tensor(rows))
    match.update(*[(["a", "b", "c"], ["a", "x", "y"]), (["a"], ["a"])][rank])
    passed.update([torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1]])][rank])
    values = [metric.compute().item() for metric in (mean, perplexity, match, passed)]
    print("VALUES", *values, file=open(f"{out}.{rank}", "w"))
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    # forked, so that the imports are paid once
    torch.multiprocessing.start_processes(main, args=(sys.argv[1], sys.argv[2]), nprocs=2, start_method="fork")
"""


@pytest.mark.distributed
def test_two_processes_of_unequal_size_give_the_union(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, str(script), str(tmp_path / "store"), str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    for rank in (0, 1):
        values = [float(word) for word in (tmp_path / f"out.{rank}").read_text().split()[1:]]
        assert values == pytest.approx([4.0, math.exp(4.0), 0.5, (0.5 + 0 + 1) / 3], rel=1e-6)
