"""Batches cut into micro-batches."""

import pytest
import torch

from alignment_modules.training.pieces import cut, empty_like

BATCH = {
    "input_ids": torch.arange(10).view(5, 2),
    "label": torch.arange(5),
    "answer": list("abcde"),
    "name": "source",
    "scale": torch.tensor(2.0),
    "segments": object(),
}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_row_is_in_one_piece_in_order(size):
    pieces = cut(BATCH, size)
    assert [len(piece["answer"]) for piece in pieces] == [size] * (5 // size) + [5 % size] * bool(5 % size)
    for key in ("input_ids", "label"):
        assert torch.equal(torch.cat([piece[key] for piece in pieces]), BATCH[key])
    assert [answer for piece in pieces for answer in piece["answer"]] == BATCH["answer"]
    assert all(piece["name"] == "source" and piece["scale"] == 2 and "segments" not in piece for piece in pieces)


@pytest.mark.parametrize("size", [None, 5, 9])
def test_a_whole_batch_keeps_its_segments(size):
    (piece,) = cut(BATCH, size)
    assert piece == BATCH
    assert piece is not BATCH


@pytest.mark.parametrize("size", [2, 5])
def test_every_piece_has_segments_of_its_own_where_there_are_some(size):
    own = [object() for _ in range(0, 5, size)]
    assert [piece["segments"] for piece in cut({**BATCH, "segments": own}, size)] == own


def test_nothing_is_cut_into_nothing():
    empty = empty_like(BATCH)
    assert (len(empty["input_ids"]), empty["answer"], empty["name"]) == (0, [], "source")
    assert empty["input_ids"].shape == (0, 2)
    assert cut(empty, None) == cut(empty, 3) == []


def test_rows_of_unequal_number_are_refused_by_name():
    with pytest.raises(ValueError, match="one number of rows; found: input_ids 5, answer 2"):
        cut({"input_ids": torch.zeros(5, 2), "answer": ["a", "b"]}, 2)
