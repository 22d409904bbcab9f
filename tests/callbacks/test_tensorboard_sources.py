"""TensorBoard on data of several sources: what matters of each is in sight, in charts of its own."""

import pytest

from alignment_modules.callbacks.tensorboard import TensorBoard, tag_of
from alignment_modules.rollouts.environments import Episode, episode_statistics


@pytest.mark.parametrize("name", ["loss", "reward", "mean_token_accuracy", "rewards/accuracies", "exact_match"])
def test_what_matters_of_a_source_is_in_sight(name):
    assert tag_of(f"train/math/{name}") == f"train/math/{name}"


@pytest.mark.parametrize("name", ["entropy", "rewards/chosen", "rewards/brevity/mean", "completions/mean_length"])
def test_its_diagnostics_stand_last(name):
    assert tag_of(f"val/math/{name}") == f"workings/val/math/{name}"
    assert tag_of(f"val/{name}") == f"val/{name}"  # of all rows it is what it was


def test_charts_of_sources_are_those_of_runs_that_have_some(tmp_path, monkeypatch):
    found = []
    for metrics in (
        {"train/math/loss": 1.0, "train/loss": 1.0},
        {"train/critic/loss": 1.0, "train/greedy/reward": 0.0, "train/loss": 1.0},
    ):
        board = TensorBoard(str(tmp_path))
        monkeypatch.setattr(board.experiment, "add_custom_scalars", lambda layout: found.append(layout))
        board.log_metrics(metrics, 1)
        board.finalize("success")
    (first, second) = (layout["what matters"] for layout in found)
    assert first.keys() - second.keys() == {"loss by source"}
    assert first["loss by source"] == ["Multiline", ["^train/(?!critic/)[^/]+/loss$"]]


def test_episodes_have_a_group_of_charts_where_there_are_some(tmp_path, monkeypatch):
    episodes = [Episode(None, prompt=[], messages=[], turns=2, calls=[], stop_reason="answer")]
    metrics = {f"train/{name}": 0.5 for name in episode_statistics(episodes)}
    found = []
    for logged in (metrics | {"train/reward": 1.0}, {"train/reward": 1.0}):
        board = TensorBoard(str(tmp_path))
        monkeypatch.setattr(board.experiment, "add_custom_scalars", found.append)
        board.log_metrics(logged, 1)
        board.finalize("success")
    assert [list(layout) for layout in found] == [["what matters", "episodes"], ["what matters"]]
    charts = found[0]["episodes"]
    assert list(charts) == [
        "calls of an episode", "calls that failed", "turns", "why episodes end", "tokens of tools",
        "environments that failed",
    ]  # fmt: skip
    tags = {f"^{tag_of(name)}$" for name in metrics}
    shown = {pattern for _, patterns in charts.values() for pattern in patterns}
    assert tags <= shown, "each of them is in a chart"


def test_what_matters_of_episodes_is_in_sight():
    assert [tag_of(f"train/{name}") for name in ("tools/calls", "tools/failure_rate", "episode/turns")] == [
        "train/tools/calls", "train/tools/failure_rate", "train/episode/turns",
    ]  # fmt: skip
    assert tag_of("train/episode/stop/answer") == "workings/train/episode/stop/answer"
    assert tag_of("train/hard/tools/calls") == "workings/train/hard/tools/calls"
