"""Prompts for methods that sample their own completions."""

from __future__ import annotations

from typing import Annotated, Any

from datamodules.base import AlignmentDataModule
from datamodules.ranges import MAX_INT, Range
from datamodules.reading import Batches, SplitReader
from datamodules.rows import formats


class PromptDataModule(AlignmentDataModule):
    """Prompts with any other columns, which reach the rewards.

    Rows: `prompt` (plain or messages) or any format that contains one; a last assistant turn is taken off and passed on
    as `completion`. Batches of every split: `prompts` and `prompt_attention_mask` `[batch, time]` (left-padded),
    `index` (row numbers in the source), `prompt` (each row's prompt as text or messages), and each other column as a
    list.

    Args:
        max_length: Most tokens of a prompt; "truncate" shortens it from the left.
        **common: Keywords of `AlignmentDataModule`.
    """

    accepts = tuple(name for name in formats.COLUMNS if name != formats.TEXT)
    gives_prompts = True

    def __init__(self, *, max_length: Annotated[int, Range(2, MAX_INT)] = 512, **common: Any) -> None:
        super().__init__(max_length=max_length, **common)

    def build(self, reader: SplitReader) -> Batches:
        """Tokenise the prompts of a split."""
        return reader.prompt_table()
