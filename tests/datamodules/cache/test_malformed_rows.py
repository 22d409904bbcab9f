"""Malformed rows on their way to disk: what a table in memory makes of them, or the same refusal."""

import pytest

from datamodules import CacheOptions
from datamodules.cache import building
from tests.datamodules.test_rows_fuzz import MODULES, ROWS, cases


def outcome(module, rows, tokenizer, cache):
    """What a start gives: the fingerprint and the report, or the refusal."""
    data = module(train=rows, tokenizer=tokenizer, cache=cache)
    try:
        data.setup("fit")
    except ValueError as error:
        return str(error)
    return data._tables["train"][0].fingerprint, data.reports["train"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_same_comes_of_it(make_tokenizer, tmp_path, monkeypatch, module, name):
    monkeypatch.setattr(building, "ROWS_OF_A_PART", 2)
    here = lambda task, pieces, processes: ((number, task(piece)) for number, piece in enumerate(pieces))  # noqa: E731
    monkeypatch.setattr(building, "in_processes", here)
    tokenizer = make_tokenizer("boundaries")
    cache = CacheOptions(folder=str(tmp_path), least_rows=1)
    for row, _ in cases(ROWS[name]):
        for rows in ([ROWS[name]] * 3 + [row], [ROWS[name], ROWS[name], row, row, ROWS[name]]):
            assert outcome(module, rows, tokenizer, cache) == outcome(module, rows, tokenizer, None)
    kept = [place for place in tmp_path.iterdir() if len(place.name) == 32]
    assert kept or isinstance(outcome(module, [ROWS[name]], tokenizer, None), str)
