"""Runs on streams, killed and resumed, end where the uninterrupted run ends, bit for bit."""

import signal

import pytest

from tests.reliability.forked_runs import rows, same_weights
from tests.reliability.streamed_runs import EVERY

RUNS = "tests.reliability.streamed_runs"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("workers", [2, 0])
@pytest.mark.parametrize("paradigm", ["pretrain", "grpo"])
def test_after_sigkill(runs, workplace, paradigm, workers):
    """With as many workers, and without; pretraining packs, and an optimizer step has two batches."""
    whole, killed = runs(f"{paradigm}/whole"), runs(f"{paradigm}/killed", code=-signal.SIGKILL)
    resumed = runs(f"{paradigm}/resumed_{workers}")
    same_weights(whole, resumed, workplace / "policy")
    seen, again = rows(killed), rows(resumed)
    assert seen == rows(whole)[: len(seen)]
    assert again[0]["step"] % EVERY[paradigm] == 0
    assert again == rows(whole)[-len(again) :]
    assert again[0] in seen[:-1]  # work after the checkpoint was lost, and is done again
    if paradigm == "grpo":
        prompts = [i for batch in rows(whole) for i in batch["rows"]]
        assert sorted(prompts[:12]) == list(range(12))  # those of the second pass follow
        assert len(prompts) == 16


def test_after_sigterm_between_the_batches_of_a_step(runs, workplace):
    """The first of them is read again."""
    stopped, continued, whole = runs("pretrain/stopped", code=143), runs("pretrain/continued"), runs("pretrain/whole")
    same_weights(whole, continued, workplace / "policy")
    assert rows(continued) == rows(whole)[len(rows(stopped)) - 1 :]


def test_two_ranks_after_sigkill(runs, workplace):
    """Each takes up its own position; another number of ranks is refused."""
    whole, resumed = runs("pretrain/two_whole"), runs("pretrain/two_resumed")
    runs("pretrain/two_killed", code=-signal.SIGKILL)
    same_weights(whole, resumed, workplace / "policy")
    for rank in range(2):
        again = rows(resumed, rank)
        assert 0 < len(again) < len(rows(whole, rank))
        assert again == rows(whole, rank)[-len(again) :]
    assert rows(whole, 0) != rows(whole, 1)
    refused = runs("pretrain/one_resumed", code=70)
    assert "world_size was 2 when the checkpoint was saved and is 1 now" in (refused / "log.txt").read_text()
