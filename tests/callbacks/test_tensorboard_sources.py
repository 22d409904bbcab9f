"""TensorBoard on data of several sources: what matters of each is in sight, in charts of its own."""

import pytest

from alignment_modules.callbacks.tensorboard import TensorBoard, tag_of


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
