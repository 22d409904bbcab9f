"""Row formats x data modules x what goes wrong with a value: a usable table that shows the text, or a clear refusal."""

import json
import math

import numpy as np
import pytest
import torch

from datamodules import (
    MixtureDataModule,
    PreferenceDataModule,
    PretrainDataModule,
    PromptDataModule,
    SFTDataModule,
    UnpairedDataModule,
)

ASKED, SAID = "whatisit", "fortytwo"
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
OTHER = [CHAT[0], {"role": "assistant", "content": "seven"}]

ROWS = {
    "text": {"text": ASKED + SAID},
    "completion": {"prompt": ASKED, "completion": SAID},
    "question": {"question": ASKED, "completion": SAID},
    "completion messages": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
    "alpaca": {"instruction": ASKED, "output": SAID},
    "preference": {"prompt": ASKED, "chosen": SAID, "rejected": "seven"},
    "query": {"query": ASKED, "chosen": SAID, "rejected": "seven"},
    "implicit": {"chosen": CHAT, "rejected": OTHER},
    "implicit text": {"chosen": f"{ASKED} {SAID}", "rejected": f"{ASKED} seven"},
    "scored": {"prompt": ASKED, "completions": [SAID, "seven"], "rewards": [1.0, 0.0]},
    "unpaired": {"prompt": ASKED, "completion": SAID, "label": True},
    "prompt": {"prompt": ASKED, "answer": 42},
}
nested = None
for _ in range(3000):
    nested = [nested]
# What a value becomes; text may turn up in another shape, everything else must be taken or refused.
CHANGES = {
    "same": lambda value: value,
    "null": lambda value: None,
    "empty text": lambda value: "",
    "empty list": lambda value: [],
    "empty mapping": lambda value: {},
    "number": lambda value: 3,
    "huge number": lambda value: 10**5000,
    "nan": lambda value: math.nan,
    "bool": lambda value: True,
    "bytes": lambda value: b"ab",
    "numpy text": lambda value: np.str_(value) if isinstance(value, str) else np.array(value, dtype=object),
    "numpy scalar": lambda value: np.float32(1),
    "tensor": lambda value: torch.tensor([1, 0]),
    "json": json.dumps,
    "python": repr,
    "parts": lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value,
    "image": lambda value: [{"role": "user", "content": [{"type": "image", "image": "x"}]}],
    "one message": lambda value: value[-1] if isinstance(value, list) and len(value) else value,
    "strings": lambda value: ["a", "b"],
    "unknown role": lambda value: [{"role": "cat", "content": "a"}],
    "no content": lambda value: [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
    "null role": lambda value: [{"role": None, "content": "a"}],
    "number as role": lambda value: [{"role": 3, "content": "a"}],
    "surrogate": lambda value: "\ud800",
    "nested": lambda value: nested,
    "nested content": lambda value: [{"role": "user", "content": nested}],
}
EXTRA = {
    "nothing": {},
    "a question": {"query": "another"},
    "system": {"system": "kindly"},
    "system number": {"system": 3},
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "tools text": {"tools": "{"},
    "images": {"images": ["a.png"]},
    "label": {"label": np.bool_(False)},
    "history": {"history": [["a", None]]},
    "source": {"source": nested},
}
MODULES = (SFTDataModule, PretrainDataModule, PreferenceDataModule, UnpairedDataModule, PromptDataModule)


def cases(row):
    yield from (({**row, column: change(row[column])}, column) for column in row for change in CHANGES.values())
    yield from (({**{k: v for k, v in row.items() if k != column}}, column) for column in row)
    yield from (({**row, **extra}, next(iter(extra), next(iter(row)))) for extra in EXTRA.values())


def spoken(value):
    """All strings of a value."""
    if isinstance(value, dict):
        return " ".join(map(spoken, value.values()))
    if isinstance(value, list) and value is not nested:
        return " ".join(map(spoken, value))
    return value if isinstance(value, str) else ""


def outcome(module, rows, tokenizer):
    """Text of the batches, or the refusal."""
    try:
        data = module(train=rows, tokenizer=tokenizer, shuffle=False, max_length=4096)
        batches = list(data.train_dataloader())
    except ValueError as error:
        return None, str(error)
    kept = data.reports["train"]["kept"]
    ids = [
        row for batch in batches for key, value in batch.items() if key.endswith(("ids", "prompts")) for row in value
    ]
    return "".join(tokenizer.convert_ids_to_tokens(torch.cat(ids).tolist())), kept


@pytest.mark.parametrize("behind", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_used_or_refused_by_name(make_tokenizer, name, module, behind):
    """No other exception, and no row of which text that was there is lost; also as a row behind a good one."""
    tokenizer = make_tokenizer("boundaries")
    for row, column in cases(ROWS[name]):
        for rows in ([ROWS[name], row],) if behind else ([row],):
            text, report = outcome(module, rows, tokenizer)
            if text is None:
                assert report.startswith("train: "), report
                assert "row" in report or "has the columns" in report, report
                continue
            if module is PromptDataModule and column == "query" and name in ("text", "implicit text"):
                continue  # the prompt is the new column, and the text is an answer
            whole = spoken(row)
            shown = (ASKED,) if module is PromptDataModule else (ASKED, SAID)
            if module is not PretrainDataModule or name != "text":
                assert all(text.count(said) >= len(rows) for said in shown if said in whole), (column, row, text)
            if "kindly" in whole and name != "text":
                assert "kindly" in text, (column, row, text)


@pytest.mark.parametrize("name", ["completion", "messages", "prompt", "scored"])
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_source_of_a_mixture_is_used_or_refused_by_name(make_tokenizer, name, module):
    """With the very words that it is refused with alone, and the rest of the mixture is as it is without."""
    good = {PretrainDataModule: "text", PreferenceDataModule: "preference", UnpairedDataModule: "unpaired"}
    tokenizer, options = make_tokenizer("boundaries"), {"max_length": 4096}
    for row, _ in list(cases(ROWS[name]))[::3]:
        alone, told = outcome(module, [row], tokenizer)
        sources = {"good": module(train=[ROWS[good.get(module, "completion")]], **options)}
        sources["other"] = module(train=[row], **options)
        refusal, batches = "", []
        try:
            batches = list(MixtureDataModule(sources=sources, tokenizer=tokenizer).train_dataloader())
        except ValueError as error:
            refusal = str(error)
        if refusal:
            assert refusal == f"source 'other': {told}" or "source 'good' has" in refusal, (refusal, told)
            continue
        assert alone is not None, (row, told)
        names = [name for batch in batches for name in batch["source_name"]]
        assert names.count("good") >= 1
        assert names.count("other") >= 1
