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
from datamodules.tokens import starts_with


class SidesTable(Table):
    """Rows of a prompt and one or two completions.

    Args:
        sides: Token ids of each side, by name ("prompt" among them).
        index: Row number of each in the source.
        labels: Whether each completion is desirable, for unpaired rows.
        loss_masks: Which tokens of a side are to be scored, by the side's name; of a side that lacks one, all.
    """

    def __init__(
        self,
        sides: dict[str, Ragged],
        index: np.ndarray,
        labels: np.ndarray | None = None,
        loss_masks: dict[str, Ragged] | None = None,
    ) -> None:
        self.sides, self.index, self.labels, self.loss_masks = sides, index, labels, loss_masks or {}
        checksum = 0 if labels is None else zlib.crc32(labels.tobytes())
        for mask in self.loss_masks.values():
            checksum = mask.checksum(checksum)
        for side in sides.values():
            checksum = side.checksum(checksum)
        self.fingerprint = f"{checksum:08x}"

    def __len__(self) -> int:
        return len(self.index)

    def row(self, index: int) -> dict[str, Any]:
        """The sides' ids, `index`, `{side}_loss_mask` where there are some, and for unpaired rows `label`."""
        row: dict[str, Any] = {name: side[index] for name, side in self.sides.items()}
        row.update((f"{name}_loss_mask", mask[index]) for name, mask in self.loss_masks.items())
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
    completions on the right; completions end with the stop token. Where completions hold messages that are not the
    assistant's, `chosen_loss_mask` and `rejected_loss_mask` say which of their tokens are to be scored. Unpaired rows
    give `prompt_*`, `completion_*` and `label` `[batch]`. Test and predict rows give batches of prompts.

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
        kept_masks: list[tuple[np.ndarray, ...]] = []
        index, labels = [], []

        def encode(examples: Sequence[Example]) -> list[tuple[np.ndarray, list[np.ndarray], list[np.ndarray], bool]]:
            sides = zip(*(self.encoder.completions(examples, name) for name in names), strict=True)
            return [(*_join(row), bool(example.label)) for row, example in zip(sides, examples, strict=True)]

        for number, (prompt, sides, masks, label) in reader.encoded(encode):
            longest = max(map(len, sides))
            if reader.too_long(number, len(prompt) + longest):
                continue
            before, after = room(len(prompt), longest, self.max_length)
            cut, masks = [side[:after] for side in sides], [mask[:after] for mask in masks]
            if not all(mask.any() for mask in masks):
                reader.count("dropped_without_target")
                continue
            if not unpaired and np.array_equal(*cut) and np.array_equal(*masks):
                reader.count("dropped_identical")
                continue
            kept.append((cut_left(prompt, before, self.encoder.first), *cut))
            kept_masks.append(tuple(masks))
            index.append(number)
            labels.append(label)
        reader.check_not_empty(len(kept))
        tables = {name: Ragged(row[i] for row in kept) for i, name in enumerate(("prompt", *names))}
        reader.report["tokens"] = sum(len(table.values) for table in tables.values())
        partly = not all(mask.all() for row in kept_masks for mask in row)
        masked = {n: Ragged((row[i] for row in kept_masks), np.bool_) for i, n in enumerate(names)} if partly else None
        desirable = np.asarray(labels) if unpaired else None
        table = SidesTable(tables, np.asarray(index, dtype=np.int64), desirable, masked)
        return table, SidesCollate(self.encoder.pad, ("prompt", *names))


def _join(
    encoded: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """The prompt that completions share, the completions and their loss masks.

    Where one completion's prompt goes on (a thought that the generation prompt opens and the other lacks), the rest
    begins its completion, not to be scored.
    """
    prompt = min((row[0] for row in encoded), key=len)
    if any(not starts_with(other, prompt) for other, _, _ in encoded):
        raise ValueError("the chat template gives the chosen and the rejected reply different prompts")
    rest = [other[len(prompt) :] for other, _, _ in encoded]
    sides = [np.concatenate((more, side)) for more, (_, side, _) in zip(rest, encoded, strict=True)]
    masks = [np.concatenate((np.zeros(len(m), bool), mask)) for m, (_, _, mask) in zip(rest, encoded, strict=True)]
    return prompt, sides, masks
