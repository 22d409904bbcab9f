"""Every paradigm takes its own batches and refuses those of others by name; the table is whole."""

import itertools

import pytest
import torch

from alignment_modules.paradigms import PARADIGMS
from tests.paradigms import OF_A_KIND, ROWS, SOURCES, build


def test_every_paradigm_has_a_row():
    assert list(ROWS) == [module.paradigm for module in PARADIGMS]
    assert {OF_A_KIND[row.kind] for row in ROWS.values()} <= set(ROWS)
    assert {row.source for row in ROWS.values()} <= set(SOURCES)


FOREIGN = [
    (name, other)
    for name, other in itertools.permutations(ROWS, 2)
    if not set({module.paradigm: module for module in PARADIGMS}[name].batch_keys) <= set(ROWS[other].batch((0, 1)))
]


@pytest.mark.parametrize(("name", "other"), FOREIGN)
def test_a_batch_of_another_paradigm_is_refused(tiny_llama, train, name, other):
    module = build(name, tiny_llama, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=f"a batch for {type(module).__name__} must hold .*this one lacks"):
        train(module, [ROWS[other].batch((0, 1))])
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("batch", [[], "text", torch.zeros(2, 3, dtype=torch.long)], ids=["list", "text", "tensor"])
def test_what_is_no_batch_is_refused(tiny_llama, name, batch):
    with pytest.raises(ValueError, match="must hold"):
        build(name, tiny_llama).check_batch(batch)


@pytest.mark.parametrize("name", ROWS)
def test_each_key_is_missed_by_name(tiny_llama, name):
    module = build(name, tiny_llama)
    whole = ROWS[name].batch((0, 1))
    module.check_batch(whole)
    for key in module.batch_keys:
        with pytest.raises(ValueError, match=f"lacks {key}: it holds"):
            module.check_batch({other: value for other, value in whole.items() if other != key})
