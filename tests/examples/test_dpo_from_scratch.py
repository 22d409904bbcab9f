"""Lesson 3 has the gradient of `DPOModule`, and its table shows what its text says."""

import copy
import math
import re

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from alignment_modules import DPOModule
from tests.examples.steps import changes, descend, moved, numbers


@pytest.fixture
def lesson_3(lesson):
    return lesson("dpo_from_scratch")


def as_batch(pairs):
    """Each column padded by itself, which is what the module takes."""
    batch = {}
    for place, name in enumerate(("prompt", "chosen", "rejected")):
        ids = [torch.tensor(pair[place]) for pair in pairs]
        batch[f"{name}_input_ids"] = pad_sequence(ids, batch_first=True)
        batch[f"{name}_attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return batch


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_modules_gradient(lesson_3, update, assert_same, beta):
    torch.manual_seed(0)
    start, pairs = lesson_3.TinyLanguageModel(), lesson_3.pairs_of(12)
    pairs = [(prompt * (1 + number % 3), *rest) for number, (prompt, *rest) in enumerate(pairs)]  # of several lengths
    policy, reference = copy.deepcopy(start), moved(start, 1)
    losses, h = lesson_3.dpo_losses(policy, reference, pairs, beta)
    assert float(h.detach().abs().max()) > 0.1
    descend(policy, losses.mean())
    halves = [as_batch(pairs[:5]), as_batch(pairs[5:])]
    options = {"policy": copy.deepcopy(start), "reference": reference, "beta": beta}
    found = update(lambda **more: DPOModule(**options, **more), halves)
    assert_same(found, changes({"policy": start}, {"policy": policy}))


def test_what_a_reader_sees(printed):
    lines = printed("dpo_from_scratch").splitlines()
    rows = numbers(lines[1:-2])
    assert rows[0][1] == pytest.approx(math.log(2), abs=1e-3)
    assert rows[0][2] == 0
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)
    assert rows[-1][2] > 0.8
    assert rows[-1][3] == 100
    assert [re.search(r"became \[(\d+)", line)[1] for line in lines[-2:]] == ["4", "13"]
    assert "[2, 1, 0, 23] became [4, 5, 6, 7]" in lines[-2]
