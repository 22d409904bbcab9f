"""Files of rows, and the loader of a rank that streams them."""

import json

import datasets
import pytest

from datamodules import SFTDataModule, StreamOptions


@pytest.fixture
def write(tmp_path):
    def to_file(rows, name="rows.jsonl"):
        path = tmp_path / name
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path, batch_size=10)
        else:
            path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
        return str(path)

    return to_file


@pytest.fixture
def loader(tokenizer):
    def make(train, module=SFTDataModule, rank=0, ranks=1, buffer_size=10, **options):
        options = {"batch_size": 4, "max_length": 24, "shuffle": False, **options}
        data = module(train=train, tokenizer=tokenizer, stream=StreamOptions(buffer_size=buffer_size), **options)
        data.setup("fit")
        return data._stream.loader(ranks, rank)

    return make
