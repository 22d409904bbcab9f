"""What is logged of episodes: the numbers of a few counted by hand, and that no split changes them."""

import math

import pytest
import torch

from alignment_modules.rollouts.environments import STOP_REASONS, Call, CallMade, Episode, Result
from alignment_modules.rollouts.environments.statistics import episode_statistics
from alignment_modules.training.meters import Meters

WELL = CallMade(0, Call("add", {"a": 1}), Result("2"))
LATE = CallMade(0, Call("add", {"a": 1}), Result("late", True, "time_limit"))
UNREAD = CallMade(1, None, Result("no JSON", True, "malformed"))


def episode(*calls, turns=1, stop_reason="answer", **more):
    return Episode(None, prompt=[], messages=[], turns=turns, calls=list(calls), stop_reason=stop_reason, **more)


EPISODES = [
    episode(WELL, WELL, LATE, turns=3, tool_tokens=30, reward=1.0),
    episode(turns=1, stop_reason="length", reward=0.0),
    episode(WELL, UNREAD, turns=4, tool_tokens=10, stop_reason="max_turns", reward=math.nan),
    episode(WELL, turns=2, tool_tokens=4, errors=["get_reward failed"]),
]
SOLVED = torch.tensor([True, False, False, True])


def means(*parts):
    meters = Meters()
    for part in parts:
        meters.update(part)
    return meters.compute(lambda values, how: values)


def test_numbers_counted_by_hand():
    told = means(episode_statistics(EPISODES, solved=SOLVED))
    stops = {f"episode/stop/{reason}": 0.0 for reason in STOP_REASONS}
    assert told == pytest.approx(
        stops
        | {"episode/stop/answer": 0.5, "episode/stop/length": 0.25, "episode/stop/max_turns": 0.25}
        | {"tools/calls": 6 / 4, "tools/failure_rate": 2 / 6, "tools/malformed": 1 / 6, "tools/calls_solved": 4 / 2}
        | {"episode/turns": 10 / 4, "episode/tool_tokens": 44 / 4, "environment/errors": 2 / 4}
    )


@pytest.mark.parametrize("cut", range(5))
def test_no_split_changes_them(cut):
    parts = [episode_statistics(EPISODES[rows], solved=SOLVED[rows]) for rows in (slice(cut), slice(cut, None))]
    assert means(*parts) == pytest.approx(means(episode_statistics(EPISODES, solved=SOLVED)))


def test_what_is_not_known_is_not_told():
    told = episode_statistics([])
    assert told.keys() == episode_statistics(EPISODES).keys(), "ranks must hold the same names"
    assert means(told) == {}
    assert "tools/calls_solved" not in told
    assert "tools/failure_rate" not in means(episode_statistics([episode()])), "there was no call"


def test_each_source_by_itself():
    told = means(episode_statistics(EPISODES, sources=["easy", "hard"]))
    assert [told["easy/tools/calls"], told["hard/tools/calls"]] == pytest.approx([3 / 2, 3 / 2])
    assert told["easy/tools/failure_rate"] == pytest.approx(1 / 3)
    assert told["hard/episode/turns"] == pytest.approx(6 / 2)
