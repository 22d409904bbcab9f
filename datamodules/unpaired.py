"""Single completions, each with a label that says whether it is desirable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.base import AlignmentDataModule
from datamodules.preference import Sides
from datamodules.reading import Batches, SplitReader
from datamodules.rows import formats
from datamodules.rows.formats import Example


class UnpairedDataModule(AlignmentDataModule):
    """Completions with a label of desirability.

    Rows: `prompt`, `completion`, `label` (plain or messages; a whole conversation's last assistant turn is the
    completion), or any rows of `PreferenceDataModule`, each of which is split into its chosen completion (true) and its
    rejected one (false); the log says so. Labels are truth values, 1 and 0 (or -1), or words such as "good" and "bad".
    Batches: `prompt_input_ids` and `completion_input_ids` `[batch, time]`, each with its `*_attention_mask`, `label`
    `[batch]` (bool), and `index`: row numbers in the source, or, of rows that were split, 2 n and 2 n + 1 for row n.
    Prompts are padded on the left, completions on the right; completions end with the stop token. Where completions
    hold messages that are not the assistant's, `completion_loss_mask` says which of their tokens are to be scored. Test
    and predict rows give batches of prompts.

    Args:
        **common: Keywords of `AlignmentDataModule`. `max_length` bounds a prompt and its completion together;
            "truncate" shortens the prompt from the left down to half of it, then the completion from the right.
    """

    accepts = (formats.UNPAIRED, formats.PREFERENCE, formats.IMPLICIT_PREFERENCE, formats.SCORED)

    def build(self, reader: SplitReader) -> Batches:
        """Tokenise the completions of a split."""
        pairs = reader.kind != formats.UNPAIRED
        names = ("chosen", "rejected") if pairs else ("completion",)
        reader.places = len(names)

        def encode(examples: Sequence[Example]) -> list[list[tuple[Any, bool]]]:
            rows = self.encoder.completions(examples, names)
            labels = [(True, False) if pairs else (bool(example.label),) for example in examples]
            return [list(zip(*both, strict=True)) for both in zip(rows, labels, strict=True)]

        sides, index, desirable = Sides(reader, self.encoder, ("completion",)), list[int](), list[bool]()
        for number, row in reader.encoded(encode):
            if pairs and all(map(np.array_equal, *(encoded for encoded, _ in row))):
                reader.count("dropped_identical")
                continue
            for place, ((prompt, completion, mask), label) in enumerate(row):
                if sides.add(number, prompt, [completion], [mask]):
                    index.append(number * len(names) + place)
                    desirable.append(label)
        if pairs:
            reader.report["format"] = f"{reader.kind}, each row split into two completions"
        reader.report.update(desirable=sum(desirable), undesirable=len(desirable) - sum(desirable))
        return sides.table(index, {"label": np.asarray(desirable, dtype=bool)})
