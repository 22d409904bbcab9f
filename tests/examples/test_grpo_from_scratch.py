"""Lesson 4 has the gradient of `GRPOModule`, and its table shows what its text says."""

import copy

import pytest
import torch

from alignment_modules import GRPOModule
from tests.examples.steps import changes, descend, moved, numbers
from tests.paradigms import never_called


@pytest.fixture
def lesson_4(lesson):
    return lesson("grpo_from_scratch")


@pytest.mark.parametrize("steps", [1, 2])
def test_the_modules_gradient(lesson_4, update, assert_same, rollout, steps):
    rows, rewards, as_batch = rollout
    torch.manual_seed(0)
    start = lesson_4.TinyLanguageModel()
    policy, reference = copy.deepcopy(start), moved(start, 1)
    old_log_probs, own = lesson_4.token_log_probs(moved(start, 2), lesson_4.collate(rows))
    old_log_probs = old_log_probs.detach()
    ratio = (lesson_4.token_log_probs(start, lesson_4.collate(rows))[0].detach() - old_log_probs).exp()[own]
    assert ratio.min() < 0.8 < 1.2 < ratio.max()
    advantages = lesson_4.group_advantages(rewards.view(3, 4)).flatten()
    assert not advantages[4:8].any()
    for _ in range(steps):
        descend(policy, lesson_4.grpo_loss(policy, reference, rows, advantages, old_log_probs))
    options = {"num_generations": 4, "max_completion_length": 6, "num_iterations": steps, "max_grad_norm": None}
    options |= {"policy": copy.deepcopy(start), "reference": reference, "preset": "grpo", "rewards": never_called}
    found = update(lambda **more: GRPOModule(**options, **more), [as_batch(old_log_probs, own)])
    assert_same(found, changes({"policy": start}, {"policy": policy}))


def test_without_old_log_probs_the_policy_is_the_one_that_sampled(lesson_4, rollout):
    rows, rewards, _ = rollout
    policy = lesson_4.TinyLanguageModel()
    now = lesson_4.token_log_probs(policy, lesson_4.collate(rows))[0].detach()
    losses = [lesson_4.grpo_loss(policy, moved(policy, 1), rows, rewards, old) for old in (None, now)]
    assert torch.equal(*losses)


def test_samples_end_with_their_stop_and_are_judged(lesson_4):
    torch.manual_seed(0)
    rows = lesson_4.sample(lesson_4.TinyLanguageModel(), [[3, 4], [5, 6]] * 64)
    completions = [completion for _, completion in rows]
    assert {len(completion) for completion in completions} > {lesson_4.LIMIT, 2}
    for completion in completions:
        assert lesson_4.STOP not in completion[:-1]
        assert completion[-1] == lesson_4.STOP or len(completion) == lesson_4.LIMIT
    assert lesson_4.reward([3], [4, 5, 6, 0]) == 1
    assert lesson_4.reward([3], [4, 5, 0]) == 0.5
    assert lesson_4.reward([3], [4, 5, 6, 7, 8, 9]) == 0.5


def test_what_a_reader_sees(printed):
    rows = numbers(printed("grpo_from_scratch").splitlines()[1:])
    assert rows[0][1] < 0.1
    assert rows[-1][1] > 0.7
    assert rows[-1][4] > 30
    assert rows[0][5] == 0
