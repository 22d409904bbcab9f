"""PatientReward: threads, retries, time limits, and what is kept when a part fails."""

import asyncio
import logging
import math
import threading
import time

import pytest
import torch
from torch import nn

from alignment_modules.rewards import ExactMatch, PatientReward, RewardError, RewardSet

TEXTS = ["x" * length for length in range(1, 13)]


def length(completions):
    return [float(len(text)) for text in completions]


def test_parts_are_in_flight_at_the_same_time_and_keep_their_order():
    together = threading.Barrier(4, timeout=5)

    def judge(completions):
        together.wait()  # passes only when four calls are there at once
        return length(completions)

    reward = PatientReward(judge, max_workers=4)
    assert reward(completions=TEXTS) == [float(number) for number in range(1, 13)]
    assert reward(completions=[]) == []


def test_it_asks_for_what_its_reward_asks_for():
    def judge(completions, gold, level=None):
        return [float(text == entry) for text, entry in zip(completions, gold, strict=True)]

    rewards = RewardSet([PatientReward(judge, batch_size=1), PatientReward(ExactMatch("gold"))])
    assert rewards.names == ("judge", "exact_match")
    table = rewards(completions=["a", "b"], columns={"gold": ["a", "c"], "unused": [1, 2]})
    assert table.values.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    for name in ("judge", "exact_match"):
        with pytest.raises(RewardError, match=f"reward '{name}' asks for 'gold'"):
            RewardSet([rewards.functions[rewards.names.index(name)]]).check_columns(["answer"])


def test_a_model_inside_is_moved():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, completions):
            return self.scale * torch.tensor(length(completions))

    net = Net()
    rewards = RewardSet([PatientReward(net)])
    assert rewards(completions=["abc"]).total.tolist() == [3.0]
    rewards.to("meta")
    assert net.scale.is_meta


def test_only_the_part_that_failed_is_asked_again():
    calls = []

    def judge(completions):
        calls.append(completions[0])
        if completions[0] == TEXTS[4] and calls.count(TEXTS[4]) < 3:
            raise ConnectionError("busy")
        return length(completions)

    assert PatientReward(judge, retries=2, batch_size=2)(completions=TEXTS) == length(TEXTS)
    assert sorted(map(calls.count, TEXTS[::2])) == [1] * 5 + [3]


def judge_that_fails_on_three(completions):
    if "xxx" in completions:
        raise ConnectionError("busy")
    return length(completions)


def test_what_was_judged_is_kept(caplog):
    reward = PatientReward(judge_that_fails_on_three, batch_size=2, on_failure="none")
    with caplog.at_level(logging.WARNING):
        table = RewardSet([reward])(completions=TEXTS)
    expected = [math.nan if number in (2, 3) else number + 1.0 for number in range(12)]
    assert table.total.tolist() == pytest.approx(expected, nan_ok=True)
    assert "gave no answer for completions 2 to 3 of the batch, asked 1 times" in caplog.text


def test_a_failure_names_the_reward_and_the_rows():
    calls = []

    def judge(completions):
        calls.append(len(completions))
        return judge_that_fails_on_three(completions)

    message = r"reward 'judge': no answer for completions 2 to 3 of the batch, asked 2 times: ConnectionError: busy"
    with pytest.raises(RewardError, match=message):
        RewardSet([PatientReward(judge, retries=1, batch_size=2)])(completions=TEXTS)
    assert len(calls) <= 7  # nobody looked for the row again


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
def test_a_call_may_take_so_long_and_no_longer(kind):
    ended = []

    def plain(completions):
        time.sleep(0.4)
        return length(completions)

    async def asynchronous(completions):
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(True)

    started = time.monotonic()
    judge = {"plain": plain, "asynchronous": asynchronous}[kind]
    with pytest.raises(RewardError, match=r"TimeoutError: no answer within timeout=0\.1 seconds"):
        PatientReward(judge, timeout=0.1)(completions=["a"])
    assert time.monotonic() - started < 0.35
    time.sleep(0.1)
    assert bool(ended) == (kind == "asynchronous")  # it was cancelled
    assert PatientReward(judge if kind == "plain" else length, timeout=5)(completions=["a"]) == [1.0]


def test_what_a_part_returns_is_checked():
    with pytest.raises(RewardError, match=r"returned 1 values for 2 completions"):
        RewardSet([PatientReward(lambda completions: [1.0], batch_size=2)])(completions=["a", "b"])


def test_from_yaml():
    from collections.abc import Callable
    from typing import Any

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=list[str | Callable[..., Any]])
    options = {"reward": "alignment_modules.rewards.ExactMatch", "retries": 3, "timeout": 30, "on_failure": "none"}
    config = parser.parse_object(
        {"rewards": [{"class_path": "alignment_modules.rewards.PatientReward", "init_args": options}]}
    )
    (reward,) = RewardSet(parser.instantiate(config).rewards).functions
    assert (reward.name, reward.retries, reward.timeout, reward.on_failure) == ("exact_match", 3, 30.0, "none")


@pytest.mark.parametrize(
    "option",
    [
        {"retries": -1},
        {"timeout": 0.0},
        {"timeout": math.nan},
        {"max_workers": 0},
        {"batch_size": 0},
        {"on_failure": "x"},
    ],
)
def test_options_are_checked(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        PatientReward(length, **option)
