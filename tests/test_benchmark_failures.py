"""The pictures of failures: what is drawn is what was logged, and every run is one that `align fit` takes."""

import contextlib
import io
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from alignment_modules.cli import run_cli
from tests.test_benchmark_offline import tiny_policy

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def failures(monkeypatch):
    """The script, imported as its neighbours are, in the folder that it is run in."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    monkeypatch.chdir(ROOT)
    import failures

    return failures


def lines(picture):
    """The points of every line of a picture, by its colour, in the order of the panels."""
    drawn = ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}polyline")
    return [
        (line.get("stroke"), [tuple(map(float, p.split(","))) for p in line.get("points").split()]) for line in drawn
    ]


def test_a_chart_places_its_points(failures):
    from curves import Panel, chart

    panels = [
        Panel("a & b", {"good": [(0, 0.0), (10, 1.0)], "bad": [(0, 0.5), (5, 2.0)]}, (0.0, 1.0)),
        Panel("c", {"bad": [(0, -4.0), (10, 0.0)]}, (-4.0, 0.0)),
    ]
    (good, first), (bad, second), (again, third) = lines(chart("<title>", panels))
    assert good != bad == again
    (left, bottom), (right, top) = first
    assert left < right
    assert top < bottom
    assert second == [(left, (top + bottom) / 2), ((left + right) / 2, top)]  # what is beyond stays at the border
    assert third == first


def test_runs_that_finished_are_drawn_and_not_run_again(failures, tmp_path, monkeypatch):
    seed = failures.Failures(tmp_path, 0)
    monkeypatch.setattr(seed.chain, "align", lambda *_: pytest.fail("a finished run was run again"))
    failure = failures.FAILURES["dpo_rate"]
    folders = [seed.folder(run) for run in failure.runs.values()]
    assert len(set(folders)) == 2
    for folder in folders:
        folder.mkdir(parents=True)
        logged = {metric: [[0, 0.0], [8, -1.0]] for metric, *_ in failure.panels}
        (folder / "curves.json").write_text(json.dumps(logged))
    drawn = failures.draw(failure, {legend: seed.curves(run) for legend, run in failure.runs.items()})
    assert len(lines(drawn)) == 2 * len(failure.panels)


@pytest.mark.slow
def test_every_run_is_one_that_fit_takes(failures, tmp_path):
    for stage in ("pretrain", "sft"):
        tiny_policy(tmp_path / stage / "export")
    (tmp_path / "sample_pairs").mkdir()
    (tmp_path / "sample_pairs" / "predictions.jsonl").write_text("")
    seed = failures.Failures(tmp_path, 0)
    runs = {run for failure in failures.FAILURES.values() for run in failure.runs.values()}
    assert len({seed.folder(run) for run in runs}) == len(runs)
    for run in runs:
        arguments = ["fit", "--config", f"configs/quickstart/{run.config}.yaml", *seed.arguments(run)]
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stopped:
            run_cli([*arguments, "--print_config"])
        assert not stopped.value.code
        assert str(seed.folder(run)) in out.getvalue()


@pytest.mark.slow
def test_a_run_is_trained_and_its_curves_are_kept(failures, tmp_path):
    tiny_policy(tmp_path / "sft" / "export")
    short = ("--trainer.max_steps", "2", "--data.batch_size", "4", "--model.lr_scheduler.init_args.warmup_steps", "0")
    run = failures.Run("grpo", short, every=1)
    curves = failures.Failures(tmp_path, 0).curves(run)
    assert [step for step, _ in curves["train/reward"]] == [1, 2]
    assert [step for step, _ in curves["val/exact_match"]] == [1, 2]
    assert "train/learning_rate" in curves  # by the metric's name, wherever TensorBoard shows it
