"""Pairs of a preferred and a rejected completion, and tables of rows with one or two completions."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.base import AlignmentDataModule
from datamodules.batching import Ragged, SidesCollate, cut_left, room
from datamodules.reading import Batches, SplitReader
from datamodules.rows import formats
from datamodules.rows.formats import Example
from datamodules.rows.messages import scalar, short
from datamodules.tables import SidesTable
from datamodules.text.encoding import Encoder
from datamodules.text.tokens import starts_with


class Sides:
    """Rows of a prompt and its completions, cut to a length and collected for a table.

    Args:
        reader: The rows' split.
        encoder: Gives the special tokens that stand first.
        names: Names of the completions, such as "chosen" and "rejected".
    """

    def __init__(self, reader: SplitReader, encoder: Encoder, names: tuple[str, ...]) -> None:
        self.reader, self.encoder, self.names = reader, encoder, names
        self.rows: list[tuple[np.ndarray, ...]] = []
        self.masks: list[tuple[np.ndarray, ...]] = []
        self.numbers = array("q")

    def add(self, number: int, prompt: np.ndarray, sides: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> bool:
        """Takes row `number` of the source, unless it is too long or nothing is left of it, which is counted."""
        longest = max(map(len, sides))
        if self.reader.too_long(number, len(prompt) + longest):
            return False
        before, after = room(len(prompt), longest, self.reader.max_length)
        sides, masks = [side[:after] for side in sides], [mask[:after] for mask in masks]
        if not all(mask.any() for mask in masks):
            self.reader.count("dropped_without_target")
            return False
        if len(sides) == 2 and np.array_equal(sides[0], sides[1]) and np.array_equal(masks[0], masks[1]):
            self.reader.count("dropped_identical")
            return False
        self.rows.append((cut_left(prompt, before, self.encoder.first), *sides))
        self.masks.append(tuple(masks))
        self.numbers.append(number)
        return True

    def table(self, index: Sequence[int], columns: dict[str, np.ndarray]) -> Batches:
        """The table of what was taken.

        Args:
            index: A number for each row taken.
            columns: Other keys, one value a row taken.
        """
        self.reader.check_not_empty(len(self.rows))
        names = ("prompt", *self.names)
        tables = {name: Ragged(row[i] for row in self.rows) for i, name in enumerate(names)}
        self.reader.report["tokens"] = sum(len(table.values) for table in tables.values())
        partly = not all(mask.all() for row in self.masks for mask in row)
        masked = {n: Ragged((row[i] for row in self.masks), np.bool_) for i, n in enumerate(self.names) if partly}
        numbers = np.asarray(self.numbers, dtype=np.int64)
        table = SidesTable(tables, np.asarray(index, dtype=np.int64), columns, masked, numbers)
        return table, SidesCollate(self.encoder.pad, names)


_LARGEST = float(np.finfo(np.float32).max)
_NUMBERS = {  # columns of numbers, and what they may be
    "margin": (-_LARGEST, _LARGEST, "a finite number"),
    "label": (0.0, 1.0, "the probability that the chosen completion is the better, from 0 to 1"),
}


class PreferenceDataModule(AlignmentDataModule):
    """Preference pairs.

    Rows: `prompt`, `chosen`, `rejected` (plain or messages); `chosen` and `rejected` that both start with the prompt;
    or `prompt`, `completions`, `rewards` (the best against the worst; ties are left out and counted). Batches:
    `prompt_input_ids`, `chosen_input_ids`, `rejected_input_ids` `[batch, time]`, each with its `*_attention_mask`, and
    `index` (row numbers in the source). Prompts are padded on the left, completions on the right; completions end with
    the stop token. Where completions hold messages that are not the assistant's, `chosen_loss_mask` and
    `rejected_loss_mask` say which of their tokens are to be scored. A column `margin` (by how much the chosen one is
    the better) becomes `margin` `[batch]`, float32, a column `label` (the probability that the chosen one is the
    better, from 0 to 1, or true or false) `label` `[batch]`, float32; all rows have one, or none. Test and predict rows
    give batches of prompts.

    Args:
        **common: Keywords of `AlignmentDataModule`. `max_length` bounds a prompt and one completion together;
            "truncate" shortens the prompt from the left down to half of it, then the completions from the right.
    """

    accepts = (formats.PREFERENCE, formats.IMPLICIT_PREFERENCE, formats.SCORED)

    def build(self, reader: SplitReader) -> Batches:
        """Tokenise the pairs of a split."""
        names = ("chosen", "rejected")
        sides, index = Sides(reader, self.encoder, names), list[int]()
        numbers: dict[str, list[float | None]] = {name: [] for name in _NUMBERS}
        given = {name for name in _NUMBERS if scalar(reader.rows[0].get(name)) is not None}

        def encode(examples: Sequence[Example]) -> list[Any]:
            return [_join(row) for row in self.encoder.completions(examples, names)]

        def see(row: Mapping[str, Any]) -> None:
            for name, found in numbers.items():
                found.append(_number(row, name))
                if (found[-1] is None) != (name not in given):
                    has, first = ("no", "has one") if found[-1] is None else ("a", "has none")
                    raise ValueError(f"has {has} {name}, and the first row {first}; give all rows a {name}, or none")

        for number, row in reader.encoded(encode, see):
            if sides.add(number, *row):
                index.append(number)
        taken = np.asarray(index, dtype=np.int64) - reader.start
        columns = {name: np.asarray(numbers[name], np.float32)[taken] for name in numbers if name in given}
        return sides.table(index, columns)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    """What a row says in one of `_NUMBERS`."""
    value, (least, greatest, words) = scalar(row.get(name)), _NUMBERS[name]
    if value is None:
        return None
    if isinstance(value, bool) and name == "label":
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= greatest:
        raise ValueError(f"column {name} must be {words}, found {short(row[name])}; rename the column if it is another")
    return float(value)


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
