"""Demonstrations for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch.utils.data import Dataset

from . import formats
from .base import AlignmentDataModule
from .encoding import LossOn
from .reading import Batches, SplitReader


class SFTDataModule(AlignmentDataModule):
    """Demonstrations in which the completion's tokens are targets.

    Rows: `prompt` and `completion` (plain or messages), `messages`, ShareGPT `conversations`, Alpaca `instruction` and
    `output`, or `text`. Batches: `input_ids`, `labels` (-100 where no target), `attention_mask` `[batch, time]`, and
    `position_ids` that restart at each row with packing. The stop token is always a target. Test and predict rows give
    batches of prompts (`prompts`, `prompt_attention_mask`, `index`, the other columns, and the row's own answer as
    `completion`).

    Args:
        train: Training rows: a path (JSONL, JSON, CSV, Parquet, text, a folder), a hub id (`owner/name@config:split`),
            or a map-style Dataset of dict rows.
        validation: Validation rows.
        test: Test rows.
        predict: Rows to predict.
        tokenizer: A tokenizer's folder or hub id, or the object; None takes the `tokenizer` attribute of a source.
        max_length: Most tokens of a row, and of a packed row.
        loss_on: Targets: the "completion" (in conversations every assistant turn), the "last_turn" alone, or "all"
            tokens.
        packing: Put several rows into one of at most `max_length` tokens.
        batch_size: Rows in a batch of one process.
        eval_batch_size: The same for validation, test and predict; None takes `batch_size`.
        overflow: A row longer than `max_length` is truncated (the prompt from the left down to half of `max_length`,
            then the completion from the right), dropped, or an error. What is lost is counted and logged.
        shuffle: Draw a new order of the training rows each epoch.
        seed: Seed of these orders.
        drop_last: Leave out a last training batch that is not full.
        num_workers: Worker processes of each loader.
        chat_template: Replaces the tokenizer's chat template: "plain", a file, or the template itself.
        as_chat: Turn plain prompts and completions into chat messages.
        columns: New names for columns of the sources, such as {"question": "prompt"}.
    """

    accepts = (formats.PROMPT_COMPLETION, formats.MESSAGES, formats.SHAREGPT, formats.ALPACA, formats.TEXT)

    def __init__(
        self,
        *,
        train: str | Dataset | Sequence[dict[str, Any]] | None = None,
        validation: str | Dataset | Sequence[dict[str, Any]] | None = None,
        test: str | Dataset | Sequence[dict[str, Any]] | None = None,
        predict: str | Dataset | Sequence[dict[str, Any]] | None = None,
        tokenizer: str | object | None = None,
        max_length: int = 1024,
        loss_on: Literal["completion", "last_turn", "all"] = "completion",
        packing: bool = False,
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
        if loss_on not in ("completion", "last_turn", "all"):
            raise ValueError(f"loss_on={loss_on!r}; allowed: 'completion', 'last_turn', 'all'")
        self.loss_on: LossOn = loss_on
        self.packing = packing

    def build(self, reader: SplitReader) -> Batches:
        """Tokenise the demonstrations of a split."""
        return reader.token_table(reader.token_rows(self.loss_on), self.packing)
