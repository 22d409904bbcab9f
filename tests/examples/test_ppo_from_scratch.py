"""Lesson 5 has both gradients of `PPOModule`, and its table shows what its text says."""

import copy

import pytest
import torch

from alignment_modules import PPOModule
from tests.examples.steps import changes, descend, moved, numbers
from tests.paradigms import never_called


@pytest.fixture
def lesson_5(lesson):
    return lesson("ppo_from_scratch")


@pytest.mark.parametrize("steps", [1, 2])
def test_the_modules_gradients(lesson_5, update, assert_same, rollout, steps):
    rows, rewards, as_batch = rollout
    torch.manual_seed(0)
    start = {"policy": lesson_5.TinyLanguageModel(), "critic": lesson_5.TinyLanguageModel(outputs=1)}
    models, reference = copy.deepcopy(start), moved(start["policy"], 1)
    old = lesson_5.judged(moved(start["policy"], 2), start["critic"], reference, rows, rewards)
    own = lesson_5.collate(rows)["labels"][:, 1:] >= 0
    for step in range(steps):
        if step:  # the values were moved so far that they are held
            change = lesson_5.values_of(models["critic"], rows).detach() - old["values"]
            assert change[own].abs().max() > lesson_5.VALUE_CLIP
        descend(models["critic"], lesson_5.critic_loss(models["critic"], rows, old["values"], old["returns"]))
        descend(models["policy"], lesson_5.policy_loss(models["policy"], rows, old["advantages"], old["log_probs"]))

    def make(optimizer):
        options = {"num_generations": 4, "max_completion_length": 6, "num_iterations": steps, "max_grad_norm": None}
        options |= {"reference": reference, "beta": lesson_5.BETA, "rewards": never_called}
        return PPOModule(**copy.deepcopy(start), **options, optimizer=optimizer, critic_optimizer=optimizer)

    assert_same(update(make, [as_batch(old["log_probs"], own)]), changes(start, models))


def test_what_a_reader_sees(printed):
    rows = numbers(printed("ppo_from_scratch").splitlines()[1:])
    assert rows[0][1] < 0.1
    assert rows[0][3] == 0
    assert rows[-1][1] > 0.6
    assert rows[-1][3] > 0.4
