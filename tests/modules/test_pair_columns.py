"""Columns of preference pairs that would change nothing are refused by the paradigms that have no use for them."""

import copy

import pytest
import torch

from tests.batches import pairs
from tests.paradigms import build, headed


@pytest.mark.parametrize(
    ("name", "column", "refused"),
    [
        ("cpo", "label", True),
        ("cpo", "margin", True),
        ("orpo", "label", True),
        ("orpo", "margin", True),
        ("reward", "label", True),
        ("reward", "margin", False),
        ("dpo", "label", False),
        ("dpo", "margin", False),
    ],
)
def test_a_column_is_used_or_refused(tiny_llama, train, name, column, refused):
    module = build(name, headed(name, copy.deepcopy(tiny_llama)))
    batch = pairs(range(4))
    plain = module.objective(dict(batch)).total
    values = {column: torch.tensor([0.0, 0.2, 0.4, 0.6])}
    if not refused:
        assert not torch.allclose(module.objective(batch | values).total, plain)
        return
    with pytest.raises(ValueError, match=f"holds `{column}`.* DPOModule .*data.columns="):
        train(module, [batch | values])
