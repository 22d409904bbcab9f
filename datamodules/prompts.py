"""Prompts for methods that sample their own completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch.utils.data import Dataset

from . import formats
from .base import AlignmentDataModule
from .reading import Batches, SplitReader


class PromptDataModule(AlignmentDataModule):
    """Prompts with any other columns, which reach the rewards.

    Rows: `prompt` (plain or messages) or any format that contains one; a last assistant turn is taken off and passed on
    as `completion`. Batches of every split: `prompts` and `prompt_attention_mask` `[batch, time]` (left-padded),
    `index` (row numbers in the source), and each other column as a list.

    Args:
        train: Training rows: a path (JSONL, JSON, CSV, Parquet, a folder), a hub id (`owner/name@config:split`), or a
            map-style Dataset of dict rows.
        validation: Validation rows.
        test: Test rows.
        predict: Rows to predict.
        tokenizer: A tokenizer's folder or hub id, or the object; None takes the `tokenizer` attribute of a source.
        max_length: Most tokens of a prompt.
        batch_size: Prompts in a batch of one process.
        eval_batch_size: The same for validation, test and predict; None takes `batch_size`.
        overflow: A prompt longer than `max_length` is truncated from the left, dropped, or an error. What is lost is
            counted and logged.
        shuffle: Draw a new order of the training rows each epoch.
        seed: Seed of these orders.
        drop_last: Leave out a last training batch that is not full.
        num_workers: Worker processes of each loader.
        chat_template: Replaces the tokenizer's chat template: "plain", a file, or the template itself.
        as_chat: Turn plain prompts into one user message.
        columns: New names for columns of the sources, such as {"question": "prompt"}.
    """

    accepts = tuple(name for name in formats.COLUMNS if name != formats.TEXT)

    def __init__(
        self,
        *,
        train: str | Dataset | Sequence[dict[str, Any]] | None = None,
        validation: str | Dataset | Sequence[dict[str, Any]] | None = None,
        test: str | Dataset | Sequence[dict[str, Any]] | None = None,
        predict: str | Dataset | Sequence[dict[str, Any]] | None = None,
        tokenizer: str | object | None = None,
        max_length: int = 512,
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
        """Tokenise the prompts of a split."""
        return reader.prompt_table()
