"""A run that is killed in an episode, between two turns, and resumed ends where the uninterrupted run ends."""

import signal

import pytest

from tests.reliability.acted_runs import EVERY, KILLED, STEPS
from tests.reliability.forked_runs import rows, same_weights
from tests.rollouts.environments.acting import SPECIAL, TEMPLATE

RUNS = "tests.reliability.acted_runs"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def acting(workplace, write_model):
    """A policy whose chat template shows tools, and its teacher."""
    characters = [*map(chr, range(32, 127)), "\n"]
    options = {"initializer_range": 0.3, "max_position_embeddings": 512}
    for name, seed in (("acting", 0), ("teaching", 1)):
        write_model(workplace / name, characters, special=SPECIAL, template=TEMPLATE, seed=seed, **options)


@pytest.mark.parametrize("paradigm", STEPS)
def test_after_sigkill_in_an_episode(acting, runs, workplace, paradigm):
    whole, killed = runs(f"{paradigm}/whole"), runs(f"{paradigm}/killed", code=-signal.SIGKILL)
    resumed = runs(f"{paradigm}/resumed")
    seen, again, expected = rows(killed), rows(resumed), rows(whole)
    assert (workplace / "killed.txt").read_text().endswith(", turn 2")
    assert seen == expected[: len(seen)]
    assert seen[-1]["step"] == KILLED + KILLED % STEPS[paradigm]
    assert again[0]["step"] == seen[-1]["step"] - seen[-1]["step"] % EVERY
    assert again == expected[-len(again) :]
    assert len(again) < len(expected)
    same_weights(whole, resumed, workplace / "acting")
