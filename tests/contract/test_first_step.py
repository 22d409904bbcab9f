"""What the first optimizer step must log, exactly, where the policy is still what it is compared with."""

import copy

import pytest
import torch

from tests.paradigms import ROWS, build, headed


@pytest.mark.parametrize("name", ROWS)
def test_first_step(tiny_llama, train, name):
    row = ROWS[name]
    assert row.first
    policy = row.first_policy(headed(name, copy.deepcopy(tiny_llama)))
    module = build(name, policy, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), **row.first_options)
    batch = row.batch(range(8))
    for key in row.first_without:
        del batch[key]
    metrics = train(module, [batch]).callback_metrics
    for metric, value in row.first.items():
        assert float(metrics[metric]) == value, metric
