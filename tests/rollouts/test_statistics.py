"""What is logged of sampling and of groups, against loops over plain numbers."""

import math

import pytest
import torch

from alignment_modules.rollouts.statistics import group_statistics, sampling_statistics
from alignment_modules.training.meters import Meters


def computed(*pieces):
    meters = Meters()
    for piece in pieces:
        meters.update(piece)
    return meters.compute(lambda values, how: values)


def random_logps(seed=0, shift=0.3):
    generator = torch.Generator().manual_seed(seed)
    sampled = -torch.rand(4, 6, generator=generator, dtype=torch.float64) * 3
    scored = sampled + shift * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 2, 0, 4])[:, None]
    return sampled, scored, mask


def by_loop(sampled, scored, mask):
    gaps = [
        (float(q) - float(p)) for p, q, m in zip(sampled.flatten(), scored.flatten(), mask.flatten(), strict=True) if m
    ]
    gaps = [gap for gap in gaps if not math.isnan(gap)]
    ratios = [math.exp(gap) for gap in gaps]
    name, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
    return {
        f"{name}/mean": sum(map(abs, gaps)) / len(gaps),
        f"{name}/max": max(map(abs, gaps)),
        f"{ratio}/mean": sum(ratios) / len(ratios),
        f"{ratio}/min": min(ratios),
        f"{ratio}/max": max(ratios),
        "sampling/k3": sum(r - 1 - gap for r, gap in zip(ratios, gaps, strict=True)) / len(gaps),
    }


def test_sampling_is_told_as_a_loop_tells_it():
    sampled, scored, mask = random_logps()
    sampled[0, 2] = torch.nan  # the engine told none
    assert computed(sampling_statistics(sampled, scored, mask)) == pytest.approx(by_loop(sampled, scored, mask))


def test_the_split_changes_nothing():
    sampled, scored, mask = random_logps(1)
    whole = computed(sampling_statistics(sampled, scored, mask))
    parts = [sampling_statistics(sampled[rows], scored[rows], mask[rows]) for rows in ([0], [1, 2], [3])]
    assert computed(*parts) == pytest.approx(whole)


def test_of_no_token_nothing_is_logged():
    sampled, scored, mask = random_logps(2)
    assert computed(sampling_statistics(sampled, scored, mask & False)) == {}
    assert computed(sampling_statistics(sampled[:0], scored[:0], mask[:0])) == {}


def test_equal_and_impossible_tokens_stay_finite():
    sampled, scored, mask = random_logps(3, shift=0.0)
    found = computed(sampling_statistics(sampled.float(), scored.float(), mask))
    assert found["sampling/k3"] == found["sampling/sampling_logp_difference/max"] == 0.0
    assert found["sampling/importance_sampling_ratio/mean"] == 1.0
    scored[0, 0], scored[0, 1] = -1e9, 1e9
    assert all(map(math.isfinite, computed(sampling_statistics(sampled, scored, mask)).values()))


def test_k3_is_not_lost_in_rounding():
    """Of a gap g it is g^2 / 2, far below float32's step at a ratio of 1."""
    sampled = torch.zeros(1, 4)
    found = computed(sampling_statistics(sampled, sampled - 1e-3, torch.ones(1, 4, dtype=torch.bool)))
    assert found["sampling/k3"] == pytest.approx(5e-7, rel=1e-3)


def test_groups_with_signal_are_those_that_differ():
    nan = torch.nan
    rewards = torch.tensor([[1.0, 0.0, 1.0], [2.0, 2.0, 2.0 + 1e-7], [nan, 1.0, 0.0], [nan, nan, 1.0], [nan] * 3])
    found = computed(group_statistics(rewards))
    assert (found["groups_with_signal"], found["frac_reward_zero_std"]) == (0.5, 0.5)


def test_single_completions_have_no_spread():
    assert computed(group_statistics(torch.tensor([[1.0], [0.0], [torch.nan]]))) == {"reward": 0.5}
