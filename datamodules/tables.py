"""Prompts as rows: token ids beside the source's own columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from datamodules.batching import Ragged, Table
from datamodules.sources import Rows


class PromptTable(Table):
    """Prompts as token ids, with the source's other columns read when asked for.

    Args:
        prompts: Token ids of each prompt.
        index: Row number of each in the source.
        rows: The source.
        columns: Names of the columns that every row passes on (None where a row lacks one).
        reference: Gives the text of a row's own completion, for the column `completion`.
    """

    def __init__(
        self, prompts: Ragged, index: np.ndarray, rows: Rows, columns: list[str], reference: Callable[[int], Any] | None
    ) -> None:
        self.prompts, self.index, self.rows, self.columns, self.reference = prompts, index, rows, columns, reference
        self.fingerprint = f"{prompts.checksum():08x}"

    def __len__(self) -> int:
        return len(self.prompts)

    def row(self, index: int) -> dict[str, Any]:
        """`prompts` (ids), `index` (row number in the source) and the columns."""
        source = int(self.index[index])
        values = self.rows[source]
        row = {"prompts": self.prompts[index], "index": source, **{name: values.get(name) for name in self.columns}}
        if self.reference is not None:
            row["completion"] = self.reference(source)
        return row
