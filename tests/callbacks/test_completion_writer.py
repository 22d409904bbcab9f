"""CompletionWriter: one line a row, as they come."""

import numpy as np
import pytest
import torch

from alignment_modules.callbacks import CompletionWriter
from alignment_modules.callbacks.completion_writer import _join
from alignment_modules.callbacks.jsonl import to_json_line


def test_rows_are_written_in_order(tmp_path, boring, make_trainer, loader, read_jsonl):
    make_trainer(CompletionWriter()).predict(boring(), loader, return_predictions=False)
    rows = read_jsonl(tmp_path / "predictions.jsonl")
    assert [row["index"] for row in rows] == list(range(24))
    assert rows[1]["completion"] == "é 1"


def test_says_where_the_rows_are(tmp_path, boring, make_trainer, loader, caplog):
    with caplog.at_level("INFO"):
        make_trainer(CompletionWriter()).predict(boring(), loader, return_predictions=False)
    assert f"wrote 24 predictions to {tmp_path / 'predictions.jsonl'}" in caplog.text


def test_a_dictionary_of_lists_and_empty_batches(tmp_path, boring, make_trainer, loader, read_jsonl):
    module = boring()
    module.predict_step = lambda batch, batch_idx: (
        {"text": ["a", "b"], "score": torch.tensor([0.5, float("nan")])} if batch_idx == 0 else None
    )
    path = tmp_path / "deep" / "out.jsonl"
    make_trainer(CompletionWriter(str(path))).predict(module, loader)
    assert read_jsonl(path) == [{"text": "a", "score": 0.5}, {"text": "b", "score": None}]


def test_an_interrupted_run_leaves_what_it_had(tmp_path, boring, make_trainer, loader, read_jsonl):
    module = boring()
    original = module.predict_step

    def failing(batch, batch_idx):
        if batch_idx == 2:
            assert len(read_jsonl(tmp_path / "predictions.jsonl")) == 8  # flushed, not only closed
            raise RuntimeError("stop")
        return original(batch, batch_idx)

    module.predict_step = failing
    writer = CompletionWriter()
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(writer).predict(module, loader)
    assert len(read_jsonl(tmp_path / "predictions.jsonl")) == 8
    assert writer._file is None


def test_an_earlier_runs_rows_stay_until_there_are_new_ones(tmp_path, boring, make_trainer, loader, read_jsonl):
    module = boring()
    make_trainer(CompletionWriter()).predict(module, loader, return_predictions=False)
    original = module.predict_step

    def failing(batch, batch_idx):
        raise RuntimeError("stop")

    module.predict_step = failing
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(CompletionWriter()).predict(module, loader)
    assert len(read_jsonl(tmp_path / "predictions.jsonl")) == 24
    module.predict_step = original
    make_trainer(CompletionWriter()).predict(module, loader, return_predictions=False)
    assert len(read_jsonl(tmp_path / "predictions.jsonl")) == 24


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.ones(3), "returned Tensor"),
        (["a"], "returned list"),
        ({"a": [1, 2], "b": [1]}, r"lists of one length; found \{'a': 2, 'b': 1\}"),
        ({"a": 1}, "returned dict"),
    ],
)
def test_other_outputs_are_refused(boring, make_trainer, loader, output, message):
    module = boring()
    module.predict_step = lambda batch, batch_idx: output
    with pytest.raises(TypeError, match=message):
        make_trainer(CompletionWriter()).predict(module, loader)


def test_parts_of_several_ranks_are_joined_by_index(tmp_path, read_jsonl):
    target = tmp_path / "out.jsonl"
    for rank in (0, 1):
        lines = [to_json_line({"index": index}) for index in range(rank, 6, 2)]
        (tmp_path / f"out.jsonl.rank{rank}").write_text("".join(lines))
    _join(target, 3)  # rank 2 wrote on another machine
    assert [row["index"] for row in read_jsonl(target)] == list(range(6))
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_parts_without_an_index_follow_the_ranks(tmp_path, read_jsonl):
    for rank in (0, 1):
        (tmp_path / f"out.jsonl.rank{rank}").write_text(to_json_line({"rank": rank}))
    _join(tmp_path / "out.jsonl", 2)
    assert [row["rank"] for row in read_jsonl(tmp_path / "out.jsonl")] == [0, 1]


def test_json_lines_are_strict():
    row = {
        "tensor": torch.tensor([[1, 2]]),
        "array": np.float64("inf"),
        "nested": [{"x": (1.5, float("nan"))}],
        "flag": True,
        "none": None,
        "text": "a\nb\ud800",
        "other": torch.float32,
        3: np.int64(4),
    }
    assert to_json_line(row) == (
        '{"tensor": [[1, 2]], "array": null, "nested": [{"x": [1.5, null]}], "flag": true, "none": null, '
        '"text": "a\\nb?", "other": "torch.float32", "3": 4}\n'
    )
