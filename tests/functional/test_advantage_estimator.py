"""How baseline, scale and aggregation compose, what contradicts, and rewards that are normalised one by one."""

import pytest
import torch

from alignment_modules.functional import AdvantageEstimator, decoupled_rewards


def test_decoupled_rewards_by_loops():
    """GDPO: a reward of large numbers weighs no more than one of small ones; NaN is left out of its reward alone."""
    generator = torch.Generator().manual_seed(3)
    rewards = torch.rand(3, 4, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1000.0])
    rewards[0, 1, 1], rewards[1, 2], rewards[2, :, 0] = torch.nan, torch.nan, 0.3
    weights = torch.tensor([0.25, 2.0], dtype=torch.float64)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for row in range(3):
        for column in range(2):
            values = rewards[row, :, column]
            kept = ~values.isnan()
            if (row, column) != (2, 0):
                expected[row, kept] += weights[column] * (values[kept] - values[kept].mean()) / values[kept].std()
    expected[1, 2] = torch.nan
    found = decoupled_rewards(rewards, weights)
    torch.testing.assert_close(found, expected, equal_nan=True)
    judged = expected[~expected.isnan()]
    whitened = (judged - judged.mean()) / judged.std()
    advantages = AdvantageEstimator(multi_objective_aggregation="normalize_then_sum")(found)
    torch.testing.assert_close(advantages[~expected.isnan()], whitened)
    scaled = decoupled_rewards(rewards * torch.tensor([1.0, 1e-3]), weights)
    torch.testing.assert_close(scaled, found, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "resolved"),
    [
        ((), ("group", "group")),
        (("leave_one_out",), ("none", "leave_one_out")),
        (("leave_one_out", "leave_one_out"), ("none", "leave_one_out")),
        ((None, "leave_one_out"), ("none", "leave_one_out")),
        ((None, "none"), ("none", "none")),
        (("batch_tokens", "none"), ("batch_tokens", "none")),
        ((None, None, "normalize_then_sum"), ("batch", "group")),
        (("none", "group", "normalize_then_sum"), ("none", "group")),
    ],
)
def test_what_is_not_said_follows_from_what_is(options, resolved):
    estimator = AdvantageEstimator(*options)
    assert (estimator.scale_rewards, estimator.baseline) == resolved
    assert estimator.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("groups",), "scale_rewards must be one of 'group', .*, got 'groups'"),
        ((None, "median"), "baseline must be one of 'group', .*, got 'median'"),
        ((None, None, "sum"), "multi_objective_aggregation must be one of 'sum_then_normalize'"),
        (("leave_one_out", "greedy"), "scale_rewards='leave_one_out' .* contradicts baseline='greedy'"),
        (("group", "greedy"), "scale_rewards='group' does not go with baseline='greedy': it takes one of 'none'"),
        (("mean", "leave_one_out"), "scale_rewards='mean' does not go with baseline='leave_one_out'"),
        (("group", None, "normalize_then_sum"), "one of scale_rewards 'batch', .*got.*scale_rewards='group'"),
        ((None, "none", "normalize_then_sum"), "takes baseline='group'.*got baseline='none'"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdvantageEstimator(*options)
