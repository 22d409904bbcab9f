"""What every table tells of its rows without reading them: their lengths, and where they come from."""

import pytest

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule, UnpairedDataModule

PAIRS = [{"prompt": "1+" * n, "chosen": "2" * n, "rejected": "345"} for n in (1, 9, 2, 3)]
ROWS = [{"prompt": "1+" * n, "completion": "2" * n} for n in (1, 9, 2, 3)]
SIDES = ("input_ids", "prompt", "chosen", "rejected", "completion")
CASES = {
    "sft": (SFTDataModule, ROWS, {}, [0, 2, 3]),
    "sft carried": (SFTDataModule, [{**row, "level": 1} for row in ROWS], {"carry": ["level"]}, [0, 2, 3]),
    "sft packed": (SFTDataModule, ROWS, {"packing": True}, None),
    "pretrain": (PretrainDataModule, [{"text": "1" * n} for n in (3, 25)], {"packing": False}, [0, 1, 1, 1]),
    "pretrain packed": (PretrainDataModule, [{"text": "1" * n} for n in (3, 25)], {}, None),
    "prompts": (PromptDataModule, ROWS, {}, [0, 2, 3]),
    "pairs": (PreferenceDataModule, PAIRS, {}, [0, 2, 3]),
    "unpaired": (UnpairedDataModule, PAIRS, {}, [0, 0, 2, 2, 3, 3]),
}


@pytest.mark.parametrize("case", CASES)
def test_lengths_and_source_rows(tokenizer, case):
    kind, rows, options, source_rows = CASES[case]
    overflow = {} if kind is PretrainDataModule else {"overflow": "drop"}
    data = kind(train=rows, tokenizer=tokenizer, max_length=11, **overflow, **options)
    data.setup("fit")
    table = data.train_dataloader().dataset
    rows = [table.row(number) for number in range(len(table))]
    names = ("prompts",) if kind is PromptDataModule else SIDES
    found = [sum(len(row[name]) for name in names if name in row) for row in rows]
    assert table.lengths.tolist() == found
    assert (table.source_rows is None) if source_rows is None else (table.source_rows.tolist() == source_rows)
