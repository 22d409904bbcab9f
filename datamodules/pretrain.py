"""Documents for pretraining, packed to a length."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from datamodules.base import AlignmentDataModule
from datamodules.ranges import check_options
from datamodules.reading import Batches, SplitReader
from datamodules.rows import formats
from datamodules.scheduling import check_packing


class PretrainDataModule(AlignmentDataModule):
    """Documents in which every token is a target.

    Rows: `text`; also `prompt` and `completion`, `messages`, ShareGPT and Alpaca rows, taken whole. Each document ends
    with the tokenizer's end-of-sequence token. Batches: `input_ids`, `labels`, `attention_mask` `[batch, time]` and,
    with packing, `position_ids` that restart at 0 at each document, so that no document attends to another. The first
    token of a document is no target. A column `weight` is as in `SFTDataModule`. Test and predict rows with a prompt
    give batches of prompts.

    Args:
        packing: Put several documents into a row of at most `max_length` tokens (no document is cut for it).
        overflow: A document longer than `max_length` is split into several (no token lost), truncated, dropped, or an
            error. What is lost is counted and logged.
        **common: Keywords of `AlignmentDataModule`.
    """

    accepts = (formats.TEXT, formats.PROMPT_COMPLETION, formats.MESSAGES, formats.SHAREGPT, formats.ALPACA)

    def __init__(
        self,
        *,
        packing: bool = True,
        overflow: Literal["split", "truncate", "drop", "error"] = "split",
        **common: Any,
    ) -> None:
        check_options(PretrainDataModule.__init__, locals())
        super().__init__(overflow=overflow, **common)
        self.packing = packing
        check_packing(self, packing)

    @staticmethod
    def _overflow_policies() -> tuple[str, ...]:
        return ("split", "truncate", "drop", "error")

    def table_options(self) -> dict[str, Any]:
        """Packing."""
        return {"packing": self.packing}

    def build(self, reader: SplitReader) -> Batches:
        """Tokenise, split and pack the documents of a split."""
        taken = array("q")
        return reader.token_table(self._pieces(reader, taken), self.packing, taken)

    def _pieces(self, reader: SplitReader, taken: array[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids, mask in reader.token_rows("all", taken):
            cuts = list(range(self.max_length, len(ids), self.max_length))
            if cuts:
                reader.count("split")
            if cuts and len(ids) - cuts[-1] == 1 and self.max_length > 2:
                cuts[-1] -= 1  # a piece of one token would have no target
            taken.extend([taken[-1]] * len(cuts))
            for piece, targets in zip(np.split(ids, cuts), np.split(mask, cuts), strict=True):
                targets = targets.copy()
                targets[0] = False
                yield piece, targets
