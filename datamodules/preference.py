"""Pairs of a preferred and a rejected completion, and single completions with a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from . import formats
from .base import AlignmentDataModule
from .batching import Ragged, SidesCollate, Table, cut_left, room
from .formats import Example
from .reading import Batches, SplitReader


class SidesTable(Table):
    """Rows of a prompt and one or two completions.

    Args:
        sides: Token ids of each side, by name ("prompt" among them).
        index: Row number of each in the source.
        labels: Whether each completion is desirable, for unpaired rows.
    """

    def __init__(self, sides: dict[str, Ragged], index: np.ndarray, labels: np.ndarray | None = None) -> None:
        self.sides, self.index, self.labels = sides, index, labels
        checksum = 0
        for side in sides.values():
            checksum = side.checksum(checksum)
        self.fingerprint = f"{checksum:08x}"

    def __len__(self) -> int:
        return len(self.index)

    def row(self, index: int) -> dict[str, Any]:
        """The sides' ids, `index` and, for unpaired rows, `label`."""
        row: dict[str, Any] = {name: side[index] for name, side in self.sides.items()}
        row["index"] = int(self.index[index])
        if self.labels is not None:
            row["label"] = bool(self.labels[index])
        return row


class PreferenceDataModule(AlignmentDataModule):
    """Preference pairs.

    Rows: `prompt`, `chosen`, `rejected` (plain or messages); `chosen` and `rejected` that both start with the prompt;
    `prompt`, `completions`, `rewards` (the best against the worst; ties are left out and counted); or unpaired
    `prompt`, `completion`, `label`. Batches: `prompt_input_ids`, `chosen_input_ids`, `rejected_input_ids` `[batch,
    time]`, each with its `*_attention_mask`, and `index` (row numbers in the source). Prompts are padded on the left,
    completions on the right; completions end with the stop token. Unpaired rows give `prompt_*`, `completion_*` and
    `label` `[batch]`. Test and predict rows give batches of prompts.

    Args:
        train: Training rows: a path (JSONL, JSON, CSV, Parquet, a folder), a hub id (`owner/name@config:split`), or a
            map-style Dataset of dict rows.
        validation: Validation rows.
        test: Test rows.
        predict: Rows to predict.
        tokenizer: A tokenizer's folder or hub id, or the object; None takes the `tokenizer` attribute of a source.
        max_length: Most tokens of a prompt and one completion together.
        batch_size: Pairs in a batch of one process.
        eval_batch_size: The same for validation, test and predict; None takes `batch_size`.
        overflow: A row longer than `max_length` is truncated (the prompt from the left down to half of `max_length`,
            then the completions from the right), dropped, or an error. What is lost is counted and logged.
        shuffle: Draw a new order of the training rows each epoch.
        seed: Seed of these orders.
        drop_last: Leave out a last training batch that is not full.
        num_workers: Worker processes of each loader.
        chat_template: Replaces the tokenizer's chat template: "plain", a file, or the template itself.
        as_chat: Turn plain prompts and completions into chat messages.
        columns: New names for columns of the sources, such as {"question": "prompt"}.
    """

    accepts = (formats.PREFERENCE, formats.IMPLICIT_PREFERENCE, formats.SCORED, formats.UNPAIRED)

    def __init__(
        self,
        *,
        train: str | Dataset | Sequence[dict[str, Any]] | None = None,
        validation: str | Dataset | Sequence[dict[str, Any]] | None = None,
        test: str | Dataset | Sequence[dict[str, Any]] | None = None,
        predict: str | Dataset | Sequence[dict[str, Any]] | None = None,
        tokenizer: str | object | None = None,
        max_length: int = 1024,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        overflow: Literal["truncate", "drop", "error"] = "truncate",
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        chat_template: str | None = None,
        as_chat: bool = False,
        columns: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            train=train,
            validation=validation,
            test=test,
            predict=predict,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            overflow=overflow,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            num_workers=num_workers,
            chat_template=chat_template,
            as_chat=as_chat,
            columns=columns,
        )

    def build(self, reader: SplitReader) -> Batches:
        """Tokenise the pairs (or labelled completions) of a split."""
        unpaired = reader.kind == formats.UNPAIRED
        names = ("completion",) if unpaired else ("chosen", "rejected")
        kept: list[tuple[np.ndarray, ...]] = []
        index, labels = [], []

        def encode(examples: Sequence[Example]) -> list[tuple[tuple[np.ndarray, ...], bool]]:
            sides = zip(*(self.encoder.completions(examples, name) for name in names), strict=True)
            return [(self._join(row), bool(example.label)) for row, example in zip(sides, examples, strict=True)]

        for number, (sides, label) in reader.encoded(encode):
            longest = max(len(side) for side in sides[1:])
            if reader.too_long(number, len(sides[0]) + longest):
                continue
            before, after = room(len(sides[0]), longest, self.max_length)
            cut = (cut_left(sides[0], before, self.encoder.first), *(side[:after] for side in sides[1:]))
            if not unpaired and np.array_equal(cut[1], cut[2]):
                reader.count("dropped_identical")
                continue
            kept.append(cut)
            index.append(number)
            labels.append(label)
        reader.check_not_empty(len(kept))
        tables = {name: Ragged(row[i] for row in kept) for i, name in enumerate(("prompt", *names))}
        reader.report["tokens"] = sum(len(table.values) for table in tables.values())
        table = SidesTable(tables, np.asarray(index, dtype=np.int64), np.asarray(labels) if unpaired else None)
        return table, SidesCollate(self.encoder.pad, ("prompt", *names))

    @staticmethod
    def _join(encoded: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
        prompt = encoded[0][0]
        if any(not np.array_equal(prompt, other) for other, _ in encoded[1:]):
            raise ValueError("the chat template gives the chosen and the rejected reply different prompts")
        return (prompt, *(completion for _, completion in encoded))
