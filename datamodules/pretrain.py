"""Documents for pretraining, packed to a length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from . import formats
from .base import AlignmentDataModule
from .reading import Batches, SplitReader


class PretrainDataModule(AlignmentDataModule):
    """Documents in which every token is a target.

    Rows: `text`; also `prompt` and `completion`, `messages`, ShareGPT and Alpaca rows, taken whole. Each document ends
    with the tokenizer's end-of-sequence token. Batches: `input_ids`, `labels`, `attention_mask` `[batch, time]` and,
    with packing, `position_ids` that restart at 0 at each document, so that no document attends to another. The first
    token of a document is no target. Test and predict rows with a prompt give batches of prompts.

    Args:
        train: Training rows: a path (JSONL, JSON, CSV, Parquet, text, a folder), a hub id (`owner/name@config:split`),
            or a map-style Dataset of dict rows.
        validation: Validation rows.
        test: Test rows.
        predict: Rows to predict.
        tokenizer: A tokenizer's folder or hub id, or the object; None takes the `tokenizer` attribute of a source.
        max_length: Tokens of a packed row, and most tokens of a document.
        packing: Put several documents into a row of at most `max_length` tokens (no document is cut for it).
        batch_size: Rows in a batch of one process.
        eval_batch_size: The same for validation, test and predict; None takes `batch_size`.
        overflow: A document longer than `max_length` is split into several (no token lost), truncated, dropped, or an
            error. What is lost is counted and logged.
        shuffle: Draw a new order of the training rows each epoch.
        seed: Seed of these orders.
        drop_last: Leave out a last training batch that is not full.
        num_workers: Worker processes of each loader.
        chat_template: Replaces the tokenizer's chat template: "plain", a file, or the template itself.
        columns: New names for columns of the sources, such as {"content": "text"}.
    """

    accepts = (formats.TEXT, formats.PROMPT_COMPLETION, formats.MESSAGES, formats.SHAREGPT, formats.ALPACA)

    def __init__(
        self,
        *,
        train: str | Dataset | Sequence[dict[str, Any]] | None = None,
        validation: str | Dataset | Sequence[dict[str, Any]] | None = None,
        test: str | Dataset | Sequence[dict[str, Any]] | None = None,
        predict: str | Dataset | Sequence[dict[str, Any]] | None = None,
        tokenizer: str | object | None = None,
        max_length: int = 1024,
        packing: bool = True,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        overflow: Literal["split", "truncate", "drop", "error"] = "split",
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        chat_template: str | None = None,
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
            columns=columns,
        )
        self.packing = packing

    @staticmethod
    def _overflow_policies() -> tuple[str, ...]:
        return ("split", "truncate", "drop", "error")

    def build(self, reader: SplitReader) -> Batches:
        """Tokenise, split and pack the documents of a split."""
        return reader.token_table(self._pieces(reader), self.packing)

    def _pieces(self, reader: SplitReader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids, mask in reader.token_rows("all"):
            cuts = list(range(self.max_length, len(ids), self.max_length))
            if cuts:
                reader.count("split")
            if cuts and len(ids) - cuts[-1] == 1 and self.max_length > 2:
                cuts[-1] -= 1  # a piece of one token would have no target
            for piece, targets in zip(np.split(ids, cuts), np.split(mask, cuts), strict=True):
                targets = targets.copy()
                targets[0] = False
                yield piece, targets
