"""Pairs of a preferred and a rejected completion, and single completions with a label."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules import formats
from datamodules.base import AlignmentDataModule
from datamodules.batching import Ragged, SidesCollate, Table, cut_left, room
from datamodules.formats import Example
from datamodules.reading import Batches, SplitReader


class SidesTable(Table):
    """Rows of a prompt and one or two completions.

    Args:
        sides: Token ids of each side, by name ("prompt" among them).
        index: Row number of each in the source.
        labels: Whether each completion is desirable, for unpaired rows.
    """

    def __init__(self, sides: dict[str, Ragged], index: np.ndarray, labels: np.ndarray | None = None) -> None:
        self.sides, self.index, self.labels = sides, index, labels
        checksum = 0 if labels is None else zlib.crc32(labels.tobytes())
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
        **common: Keywords of `AlignmentDataModule`. `max_length` bounds a prompt and one completion together;
            "truncate" shortens the prompt from the left down to half of it, then the completions from the right.
    """

    accepts = (formats.PREFERENCE, formats.IMPLICIT_PREFERENCE, formats.SCORED, formats.UNPAIRED)

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
