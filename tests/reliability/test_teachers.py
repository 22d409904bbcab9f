"""Teachers from the command line: one, several by name, and those that are not there."""

import json

import pytest
import torch


def test_several_teachers_from_the_command_line(align, tmp_path):
    rows = [{"prompt": f"{a}+1=", "completion": str(a + 1), "teacher": "ab"[a % 2]} for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    teachers = {"a": "other", "b": {"path": "policy", "dtype": "float32"}}
    given = ["--model.teacher", json.dumps(teachers), "--data.train", tmp_path / "rows.jsonl"]
    given += ["--trainer.max_steps", "2", "--trainer.logger", json.dumps(logger)]
    result = align("fit", "-c", "distillation.yaml", *given, "--data.carry", '["teacher"]')
    assert result.code == 0, result.text
    (header, *_) = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert {"train/divergence/a", "train/divergence/b"} <= set(header.split(","))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert set(torch.load(checkpoint, weights_only=True)["alignment_module"]["companions"]) == {
        "teacher.a",
        "teacher.b",
    }
    refused = align("fit", "-c", "distillation.yaml", *given)
    assert "must hold `teacher`, a name for each row" in str(refused.error or refused.text)


@pytest.mark.parametrize(("teacher", "message"), [
    (None, "--model.teacher: required by DistillationModule"),
    ("nowhere", "teacher"),
    ('{"a": "nowhere"}', "teacher.a"),
    ('{"a": {"pth": "policy"}}', "teacher"),
])  # fmt: skip
def test_teachers_that_are_not_there(align, teacher, message):
    more = [] if teacher is None else ["--model.teacher", teacher]
    result = align("fit", "-c", "sft.yaml", "--model", "DistillationModule", *more)
    assert result.code != 0
    text = result.text + str(result.error or "")
    assert message in text
    assert "Traceback" not in text
