"""Advantages of completions: what each baseline and scale optimises (exact enumeration), rounding, and NaN."""

from __future__ import annotations

import math

import pytest
import torch

from alignment_modules.functional import (
    ADVANTAGE_SCALES,
    BASELINES,
    AdvantageEstimator,
    decoupled_rewards,
    group_advantages,
)

PROBABILITIES = (0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95)
GROUP = 8


def advantages_of(rewards, scale, lengths=None, **options):
    """With lengths where the scale reads them: 1, 2, 3, 1, 2, ... tokens unless given."""
    if scale == "batch_tokens" and lengths is None:
        lengths = (torch.arange(rewards.numel()) % 3 + 1).view(rewards.shape)
    return group_advantages(rewards, scale=scale, lengths=lengths, **options)


def by_tokens(groups, lengths):
    """REINFORCE++-baseline by lists: every token holds its completion's centred reward, and all are whitened."""
    centred = [[r - sum(group) / len(group) for r in group] for group in groups]
    tokens = torch.tensor(
        [c for row, ns in zip(centred, lengths, strict=True) for c, n in zip(row, ns, strict=True) for _ in range(n)],
        dtype=torch.float64,
    )
    return [[((c - tokens.mean()) / tokens.std()).item() for c in row] for row in centred]


def update_weight(p, estimate=group_advantages, **options):
    """w(p) of the expected update w(p) * dp: the mean of A * dlog p over all outcomes of a group."""
    weight = 0.0
    for wins in range(GROUP + 1):
        chance = math.comb(GROUP, wins) * p**wins * (1 - p) ** (GROUP - wins)
        rewards = torch.tensor([[1.0] * wins + [0.0] * (GROUP - wins)], dtype=torch.float64)
        advantages = estimate(rewards, **options)[0]
        # d log p(win) = dp / p, d log p(loss) = -dp / (1 - p)
        scores = rewards[0] / p - (1 - rewards[0]) / (1 - p)
        weight += chance * (advantages * scores).mean().item()
    return round(weight, 3)


ONE_TOKEN = torch.ones(1, GROUP)
GRPO = (2.313, 2.177, 1.895, 1.736, 1.895, 2.177, 2.313)
RLOO, CENTRED = (1,) * 7, (0.875,) * 7
PASS_AT_8 = tuple(round((1 - p) ** 7, 3) for p in PROBABILITIES)
"""The slope of the chance that one of 8 is right, 1 - (1 - p)^8, over 8."""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scale": "leave_one_out"}, RLOO),
        ({"scale": "none", "baseline": "leave_one_out"}, RLOO),
        ({"scale": "none", "baseline": "none"}, RLOO),
        ({"scale": "none", "baseline": "greedy", "greedy_rewards": torch.tensor([1.0])}, RLOO),
        ({"scale": "none", "baseline": "greedy", "greedy_rewards": torch.tensor([0.25])}, RLOO),
        ({"scale": "none"}, CENTRED),
        ({"scale": "none", "baseline": "length_weighted", "lengths": 3 * ONE_TOKEN}, CENTRED),
        ({"scale": "none", "baseline": "pass_at_k"}, PASS_AT_8),
        ({"scale": "group"}, GRPO),
        ({"scale": "group", "ddof": 0}, (2.473, 2.328, 2.026, 1.856, 2.026, 2.328, 2.473)),
        ({"scale": "group", "baseline": "leave_one_out"}, (2.644, 2.488, 2.166, 1.984, 2.166, 2.488, 2.644)),
        ({"scale": "batch_tokens", "lengths": ONE_TOKEN}, GRPO),
        ({"scale": "batch_tokens", "baseline": "none", "lengths": ONE_TOKEN}, GRPO),
        ({"scale": "mean"}, (6.033, 5.217, 3.466, 1.984, 1.333, 1.111, 1.053)),
    ],
)
def test_what_each_estimator_optimises(options, expected):
    assert tuple(update_weight(p, **options) for p in PROBABILITIES) == expected


def test_decoupled_rewards_of_one_reward_optimise_as_grpo():
    def estimate(rewards):
        return group_advantages(decoupled_rewards(rewards[..., None], torch.ones(1)), scale="batch")

    assert tuple(update_weight(p, estimate) for p in PROBABILITIES) == GRPO


def test_probability_that_a_group_has_signal():
    chances = []
    for p in PROBABILITIES:
        chance = 0.0
        for wins in range(GROUP + 1):
            rewards = torch.tensor([[1.0] * wins + [0.0] * (GROUP - wins)])
            if group_advantages(rewards).any():
                chance += math.comb(GROUP, wins) * p**wins * (1 - p) ** (GROUP - wins)
        chances.append(round(chance, 3))
    assert chances == [0.337, 0.570, 0.900, 0.992, 0.900, 0.570, 0.337]


def by_loops(rewards, scale):
    everything = torch.tensor([r for row in rewards for r in row], dtype=torch.float64)
    result = []
    if scale == "batch_tokens":
        lengths = iter(i % 3 + 1 for i in range(len(everything)))
        return torch.tensor(by_tokens(rewards, [[next(lengths) for _ in row] for row in rewards]), dtype=torch.float64)
    for row in rewards:
        group = torch.tensor(row, dtype=torch.float64)
        for i, r in enumerate(row):
            others = [x for j, x in enumerate(row) if j != i]
            centred = r - group.mean().item()
            result.append(
                {
                    "group": lambda c=centred, g=group: c / g.std().item(),
                    "batch": lambda c=centred: c / everything.std().item(),
                    "none": lambda c=centred: c,
                    "leave_one_out": lambda r=r, o=others: r - sum(o) / len(o),
                    "mean": lambda c=centred, g=group: c / g.mean().item() if g.mean() > 0 else 0.0,
                }[scale]()
            )
    return torch.tensor(result, dtype=torch.float64).view(len(rewards), -1)


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
def test_by_loops(scale):
    rewards = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(advantages_of(rewards, scale), by_loops(rewards.tolist(), scale))


def composed_by_loops(groups, lengths, greedy, baseline, scale):
    """A baseline and a scale over lists of judged rewards, from the papers."""
    centred = []
    for group, ns, own in zip(groups, lengths, greedy, strict=True):
        ranked = sorted(group, reverse=True)
        for r in group:
            others = [*group]
            others.remove(r)
            centred.append(
                {
                    "group": lambda r=r, g=group: r - sum(g) / len(g),
                    "leave_one_out": lambda r=r, o=others: r - sum(o) / len(o),
                    "length_weighted": lambda r=r, g=group, n=ns: (
                        r - sum(a * b for a, b in zip(n, g, strict=True)) / sum(n)
                    ),
                    "pass_at_k": lambda r=r, k=ranked: k[0] - k[1] if r == k[0] else 0.0,
                    "greedy": lambda r=r, own=own: r - own,
                    "none": lambda r=r: r,
                }[baseline]()
            )
    everything = torch.tensor([r for group in groups for r in group], dtype=torch.float64)
    by_group = torch.tensor([group for group in groups for _ in group], dtype=torch.float64)
    centred, counts = torch.tensor(centred, dtype=torch.float64), torch.tensor([n for ns in lengths for n in ns])
    if scale == "batch_tokens":
        tokens = centred.repeat_interleave(counts)
        return (centred - tokens.mean()) / tokens.std()
    divisor = {"group": by_group.std(dim=1), "batch": everything.std(), "none": 1.0, "mean": by_group.mean(dim=1)}
    return centred / divisor[scale]


COMPOSED = [(baseline, scale) for baseline in BASELINES if baseline != "optimal_token" for scale in BASELINES[baseline]]


@pytest.mark.parametrize(("baseline", "scale"), COMPOSED)
def test_each_baseline_with_each_scale_by_loops(baseline, scale):
    generator = torch.Generator().manual_seed(2)
    rewards = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, (4, 5), generator=generator)
    greedy = torch.rand(4, generator=generator, dtype=torch.float64)
    found = AdvantageEstimator(scale, baseline)(rewards, lengths=lengths, greedy_rewards=greedy)
    expected = composed_by_loops(rewards.tolist(), lengths.tolist(), greedy.tolist(), baseline, scale)
    torch.testing.assert_close(found.flatten(), expected)
    with_gaps = torch.cat([rewards, torch.full((4, 1), torch.nan)], dim=1)  # one more that nobody judged
    longer = torch.cat([lengths, torch.full((4, 1), 7)], dim=1)
    found = AdvantageEstimator(scale, baseline)(with_gaps, lengths=longer, greedy_rewards=greedy)
    torch.testing.assert_close(found[:, :5].flatten(), expected)
    assert (found[:, 5] == 0).all()


@pytest.mark.parametrize(("baseline", "scale"), COMPOSED)
@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 12345.678])
def test_equal_rewards_teach_nothing_whatever_is_subtracted(baseline, scale, value):
    """Not even a rounding residue; only a reward that is compared with nothing and divided by nothing stays."""
    rewards, greedy = (torch.full(shape, value, dtype=torch.float64) for shape in ((2, 6), (2,)))
    for seed in range(10):
        lengths = torch.randint(1, 30, (2, 6), generator=torch.Generator().manual_seed(seed))
        found = AdvantageEstimator(scale, baseline)(rewards, lengths=lengths, greedy_rewards=greedy)
        assert (found == (rewards if (baseline, scale) == ("none", "none") else 0)).all()


def test_the_best_gains_what_the_group_would_lose_without_it():
    """Leave-one-out of the maximum; ties at the top gain nothing, and neither does who is not the best."""
    nan = torch.nan
    rewards = torch.tensor([[0.2, 1.0, 0.7, nan], [1.0, 1.0, 0.0, 0.5], [3.0, nan, nan, nan], [-2.0, -1.0, -4.0, -1.5]])
    found = group_advantages(rewards, scale="none", baseline="pass_at_k")
    expected = torch.tensor([[0, 0.3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0.5, 0, 0]])
    torch.testing.assert_close(found, expected)
    for row, kept in ((0, [0, 1, 2]), (3, [0, 1, 2, 3])):
        group = rewards[row, kept]
        without = torch.stack([torch.cat([group[:i], group[i + 1 :]]).max() for i in range(len(group))])
        torch.testing.assert_close(found[row, kept], group.max() - without)


def test_a_longer_completion_counts_more_in_the_length_weighted_baseline():
    found = group_advantages(
        torch.tensor([[1.0, 0.0]]), scale="none", baseline="length_weighted", lengths=torch.tensor([[3, 1]])
    )
    assert found.tolist() == [[0.25, -0.75]]


def test_one_completion_is_enough_where_none_is_compared():
    rewards = torch.tensor([[1.0], [0.0], [torch.nan]])
    greedy = torch.tensor([0.5, torch.nan, 1.0])
    found = group_advantages(rewards, scale="none", baseline="greedy", greedy_rewards=greedy)
    assert found.tolist() == [[0.5], [0.0], [0.0]]
    found = group_advantages(rewards, scale="batch_tokens", baseline="none", lengths=torch.tensor([[2], [2], [9]]))
    torch.testing.assert_close(found, torch.tensor([[0.75**0.5], [-(0.75**0.5)], [0.0]]))


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
@pytest.mark.parametrize("size", range(2, 17))
def test_equal_rewards_give_exactly_zero(scale, size):
    """Float32 means of equal rewards leave residues of order 1 after division by their deviation."""
    for value in (0.1, 0.3, 0.7, 0.9, 1 / 3, 12345.678):
        rewards = torch.full((2, size), value)
        assert (advantages_of(rewards, scale) == 0).all()
        spread = torch.cat([rewards[:1], torch.arange(size)[None].float()])
        assert (advantages_of(spread, scale)[0] == 0).all()


def test_rewards_equal_up_to_rounding_count_as_equal():
    assert (group_advantages(torch.tensor([[0.3, 0.3 + 1e-7, 0.3]], dtype=torch.float64)) == 0).all()
    assert (group_advantages(torch.tensor([[0.3, 0.3 + 1e-5, 0.3]], dtype=torch.float64)) != 0).any()


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
def test_nan_is_left_out_of_its_group(scale):
    rewards = torch.tensor([[1.0, torch.nan, 0.0, 0.5], [torch.nan, 2.0, 1.0, 4.0]])
    lengths = torch.tensor([[3, 9, 1, 2], [8, 4, 2, 2]])
    result = advantages_of(rewards, scale, lengths if scale == "batch_tokens" else None)
    assert torch.isfinite(result).all()
    assert (result[rewards.isnan()] == 0).all()
    kept, count = (torch.stack([x[0, [0, 2, 3]], x[1, 1:]]) for x in (rewards, lengths))
    expected = advantages_of(kept, scale, count if scale == "batch_tokens" else None)
    torch.testing.assert_close(result[0, [0, 2, 3]], expected[0])
    torch.testing.assert_close(result[1, 1:], expected[1])


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
def test_rows_without_a_reward_are_removed(scale):
    """As the formulas say for groups of unequal sizes, in double precision; of a single reward nothing can be said."""
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    rewards[torch.rand(7, 5, generator=generator) < 0.4] = torch.nan
    rewards[2], rewards[3, 1:] = torch.nan, torch.nan
    kept = [[reward for reward in row if reward == reward] for row in rewards.tolist()]
    assert {len(row) for row in kept} >= {0, 1, 2, 3}
    everything = torch.tensor([reward for row in kept for reward in row], dtype=torch.float64)
    result = advantages_of(rewards, scale)
    lengths = (torch.arange(35) % 3 + 1).view(7, 5)
    counts = [n[~row.isnan()].tolist() for n, row in zip(lengths, rewards, strict=True)]
    whitened = by_tokens([group or [0.0] for group in kept], [count or [0] for count in counts])
    for row, group in zip(range(7), kept, strict=True):
        judged = ~rewards[row].isnan()
        assert (result[row][~judged] == 0).all()
        if len(group) < 2:
            assert (result[row] == 0).all()
            continue
        values = torch.tensor(group, dtype=torch.float64)
        centred = values - values.mean()
        expected = {
            "group": centred / values.std(),
            "batch": centred / everything.std(),
            "batch_tokens": torch.tensor(whitened[row], dtype=torch.float64),
            "none": centred,
            "leave_one_out": values - (values.sum() - values) / (len(group) - 1),
            "mean": centred / values.mean() if values.mean() > 0 else torch.zeros_like(values),
        }[scale]
        torch.testing.assert_close(result[row][judged], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
def test_groups_with_one_or_no_reward(scale):
    nan = torch.nan
    assert (advantages_of(torch.tensor([[nan, nan, nan], [3.0, nan, nan]]), scale) == 0).all()
    assert advantages_of(torch.zeros(0, 4), scale).shape == (0, 4)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float64, torch.float64), (torch.long, torch.float32)])
def test_dtype(dtype, expected):
    assert group_advantages(torch.tensor([[0, 1]], dtype=dtype)).dtype == expected


def test_eps_is_added_to_the_deviation():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    expected = (rewards - 0.5) / (rewards.std() + 0.1)
    torch.testing.assert_close(group_advantages(rewards, eps=0.1), expected)


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (torch.zeros(3, 1), {}, r"rewards must be \[prompts, G\] with G >= 2.*got G=1"),
        (torch.zeros(3), {}, r"rewards must be \[prompts, G\], got shape \(3,\)"),
        (torch.tensor([[1.0, torch.inf]]), {}, "rewards must be finite"),
        (torch.zeros(3, 2), {"scale": "std"}, "scale must be one of 'group', .*, got 'std'"),
        (torch.zeros(3, 2), {"scale": "batch_tokens"}, "scale='batch_tokens' needs lengths"),
        (torch.zeros(3, 2), {"lengths": torch.ones(3, 2)}, "scale='group' reads no lengths"),
        (
            torch.zeros(3, 2),
            {"scale": "batch_tokens", "lengths": torch.ones(2, 2)},
            r"lengths must have the shape of rewards, \(3, 2\), got \(2, 2\)",
        ),
        (torch.zeros(3, 2), {"ddof": 2}, "ddof=2 must be an integer from 0 to 1"),
        (torch.zeros(3, 0), {"baseline": "none", "scale": "none"}, r"with G >= 1, got G=0"),
        (torch.zeros(3, 2), {"baseline": "greedy", "scale": "none"}, "baseline='greedy' needs greedy_rewards"),
        (torch.zeros(3, 2), {"greedy_rewards": torch.zeros(3)}, "baseline='group' reads no greedy_rewards"),
        (torch.zeros(3, 2), {"baseline": "length_weighted", "scale": "none"}, "'length_weighted' needs lengths"),
        (torch.zeros(3, 2), {"baseline": "optimal_token"}, "baseline must be one of .*, got 'optimal_token'"),
        (torch.zeros(3, 2), {"baseline": "none"}, "scale='group' does not go with baseline='none'"),
    ],
)
def test_refuses(rewards, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, **options)


def test_three_ways_to_scale_by_the_batch():
    """Lite PPO's; whitened over sequences, which is batch_tokens with completions of one length; and over tokens."""
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 0]], dtype=torch.float64)
    lengths = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    expected = {
        "batch": (None, 0.96609, -0.96609, 0.48305, -1.44914),
        "sequences": (torch.ones(2, 4), 1.0, -1.0, 0.5, -1.5),
        "tokens": (lengths, 0.98846, -1.33732, 0.40701, -1.91877),
    }
    for lengths, *numbers in expected.values():
        scale = "batch" if lengths is None else "batch_tokens"
        result = group_advantages(rewards, scale=scale, lengths=lengths)
        found = [result[0, 0], result[0, 1], result[1, 0], result[1, 3]]
        assert [round(float(x), 5) for x in found] == numbers


def test_a_group_without_signal_stays_zero_between_others():
    rewards = torch.tensor([[1.0, 0, 0.5], [0.3, 0.3, 0.3]])
    result = group_advantages(rewards, scale="batch_tokens", lengths=torch.tensor([[5, 1, 2], [9, 9, 9]]))
    assert (result[1] == 0).all()
    assert result[0, 2] != 0  # at its group's mean, but not at that of the tokens


def test_completions_without_tokens_weigh_nothing():
    rewards, lengths = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2, 3], [0, 0]])
    result = group_advantages(rewards, scale="batch_tokens", lengths=lengths)
    torch.testing.assert_close(
        result[:1], group_advantages(rewards[:1], scale="batch_tokens", lengths=lengths[:1]), rtol=0, atol=0
    )
