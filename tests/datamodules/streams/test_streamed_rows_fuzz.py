"""Malformed rows: a stream takes and refuses them as a table does, and says the same."""

from itertools import islice

import pytest
import torch
from torch.utils.data import IterableDataset

from datamodules import StreamOptions
from tests.datamodules.test_rows_fuzz import MODULES, ROWS, cases


class Given(IterableDataset):
    """The rows as they are."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def outcome(module, rows, tokenizer, stream):
    """The first batch of a pass, or the refusal without the source's name."""
    options = {"tokenizer": tokenizer, "shuffle": False, "max_length": 4096}
    try:
        if not stream:
            data = module(train=rows, batch_size=8, **options)
            return next(iter(data.train_dataloader()))
        table = module(train=rows, **options)
        table.setup("fit")
        data = module(train=Given(rows), batch_size=len(table._table("train")[0]), stream=StreamOptions(8), **options)
        [batch] = islice(data.train_dataloader(), 1)
    except ValueError as error:
        return str(error).replace("the Given given as train", "the list given as train")
    return batch


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("name", ROWS)
def test_a_stream_says_what_a_table_says(make_tokenizer, name, module):
    tokenizer = make_tokenizer("boundaries")
    for row, _ in cases(ROWS[name]):
        rows = [ROWS[name], row]
        expected, found = (outcome(module, rows, tokenizer, stream) for stream in (False, True))
        if isinstance(expected, str):
            assert found == expected
            continue
        assert expected.keys() == found.keys(), row
        for key, value in expected.items():
            assert torch.equal(value, found[key]) if isinstance(value, torch.Tensor) else value == found[key]
