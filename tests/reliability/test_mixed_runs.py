"""Mixtures and curricula: killed and resumed they end where the uninterrupted run ends, on two ranks as on one."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.reliability.forked_runs import rows, same_weights
from tests.reliability.mixed_runs import EVERY

RUNS = "tests.reliability.mixed_runs"
pytestmark = pytest.mark.slow


def goes_on(whole, killed, resumed, rank=0):
    """The killed run is the beginning of the whole one, and the resumed run the rest, after a checkpoint."""
    seen, again, expected = rows(killed, rank), rows(resumed, rank), rows(whole, rank)
    assert seen == expected[: len(seen)]
    assert again[0]["step"] % EVERY == 0
    assert 0 < len(again) < len(expected)
    assert again == expected[-len(again) :]
    assert again[0] in seen  # work after the checkpoint was lost, and is done again


@pytest.mark.parametrize("paradigm", ["sft", "grpo"])
def test_a_mixture_after_sigkill_with_two_workers(runs, workplace, paradigm):
    whole, killed = runs(f"{paradigm}/whole"), runs(f"{paradigm}/killed", code=-signal.SIGKILL)
    resumed = runs(f"{paradigm}/resumed")
    goes_on(whole, killed, resumed)
    same_weights(whole, resumed, workplace / "policy")


def test_two_ranks_admit_what_one_process_admits(runs):
    """Each step's rows are the same on one process and on two together, and not those of a run without a curriculum."""
    one, two, plain = runs("curriculum/one"), runs("curriculum/two"), runs("curriculum/plain")
    both = [sorted(a["rows"] + b["rows"]) for a, b in zip(rows(two, 0), rows(two, 1), strict=True)]
    assert both == [sorted(batch["rows"]) for batch in rows(one)]
    assert both != [sorted(batch["rows"]) for batch in rows(plain)]
    alone, together = (load_file(run / "export" / "model.safetensors") for run in (one, two))
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=1e-4, rtol=1e-4)


def test_two_ranks_with_a_curriculum_after_sigkill(runs, workplace):
    whole, killed = runs("curriculum/two"), runs("curriculum/two_killed", code=-signal.SIGKILL)
    resumed = runs("curriculum/two_resumed")
    for rank in range(2):
        goes_on(whole, killed, resumed, rank)
    same_weights(whole, resumed, workplace / "policy")
