"""Sources that are tokenised in several parts, and comparison of what two data modules give."""

import json
from dataclasses import replace

import pytest
import torch

from datamodules import CacheOptions
from datamodules.cache import building, store

ROWS = 130


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(building, "ROWS_OF_A_PART", 50)
    monkeypatch.setattr(store, "flush", lambda path: None)  # a loss of power is not tested


@pytest.fixture
def options(tmp_path):
    """Everything of ten rows or more is kept, in several parts."""
    return CacheOptions(folder=str(tmp_path / "cache"), num_proc=1, least_rows=10)


@pytest.fixture
def two(options):
    """The same, made by two processes."""
    return replace(options, num_proc=2)


@pytest.fixture
def write(tmp_path):
    def to_file(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
        return str(path)

    return to_file


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


@pytest.fixture
def assert_same_batches():
    def compare(one, *others):
        count = 0
        for batch, *rest in zip(one, *others, strict=True):
            count += 1
            for other in rest:
                assert batch.keys() == other.keys()
                assert all(same(batch[key], other[key]) for key in batch)
        assert count

    return compare
