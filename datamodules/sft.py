"""Demonstrations for supervised fine-tuning."""

from __future__ import annotations

from array import array
from typing import Any, Literal

from datamodules.base import AlignmentDataModule
from datamodules.ranges import check_options
from datamodules.reading import Batches, SplitReader
from datamodules.rows import formats
from datamodules.scheduling import check_packing
from datamodules.tables import OF_MIXTURES
from datamodules.text.encoding import LossOn

BATCH_KEYS = ("input_ids", "labels", "attention_mask", "position_ids", "loss_weights", *OF_MIXTURES)


class SFTDataModule(AlignmentDataModule):
    """Demonstrations in which the completion's tokens are targets.

    Rows: `prompt` and `completion` (plain or messages), `messages`, ShareGPT `conversations`, Alpaca `instruction` and
    `output`, or `text`. Batches: `input_ids`, `labels` (-100 where no target), `attention_mask` `[batch, time]`, and
    `position_ids` that restart at each row with packing. The stop token is always a target.

    An assistant's message may have a `weight`, a row a column `weight`: finite numbers of at least 0, 1 where there is
    none. A target weighs what its message does times what its row does, and 0 is not learnt. Where a weight is not 1
    batches also hold `loss_weights` `[batch, time]`, float32, 0 where no target; the module divides by their sum.

    Test and predict rows give batches of prompts (`prompts`, `prompt_attention_mask`, `index`, `prompt` as text or
    messages, the other columns, and the row's own answer as `completion`).

    Args:
        loss_on: Targets: the "completion" (in conversations every assistant turn), the "last_turn" alone, or "all"
            tokens.
        packing: Put several rows into one of at most `max_length` tokens.
        carry: Columns that batches of training and validation hold as lists, one value a row, such as the `teacher`
            that `DistillationModule` asks for; not with `packing`.
        **common: Keywords of `AlignmentDataModule`. "truncate" shortens the prompt from the left down to half of
            `max_length`, then the completion from the right.
    """

    accepts = (formats.PROMPT_COMPLETION, formats.MESSAGES, formats.SHAREGPT, formats.ALPACA, formats.TEXT)

    def __init__(
        self,
        *,
        loss_on: Literal["completion", "last_turn", "all"] = "completion",
        packing: bool = False,
        carry: list[str] | None = None,
        **common: Any,
    ) -> None:
        check_options(SFTDataModule.__init__, locals())
        super().__init__(**common)
        self.loss_on: LossOn = loss_on
        self.packing = packing
        self.carry = carry or []
        check_packing(self, packing)
        if self.carry and packing:
            raise ValueError(f"carry={self.carry} with packing=True: a packed row holds several rows' values")
        if clash := sorted({*self.carry} & {*BATCH_KEYS}):
            raise ValueError(f"carry={self.carry}: batches use {clash} themselves; give the column another name")

    def table_options(self) -> dict[str, Any]:
        """Targets, packing, and the columns carried on."""
        return {"loss_on": self.loss_on, "packing": self.packing, "carry": self.carry}

    def build(self, reader: SplitReader) -> Batches:
        """Tokenise the demonstrations of a split."""
        taken = array("q")
        batches = reader.token_table(reader.token_rows(self.loss_on, taken), self.packing, taken)
        return reader.carried(batches, self.carry, taken) if self.carry else batches
