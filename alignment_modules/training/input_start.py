"""Adapters that start from what their layers read (`lora.init: eva`), which a run knows with its first batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from alignment_modules.policies.input_start import find_waiting, input_directions, set_directions
from alignment_modules.policies.segments import Segments
from alignment_modules.training.pieces import SEGMENTS, cut


class InputStart(L.LightningModule):
    """Starts adapters of `lora.init: eva` with the batch that a run begins with, before anything is computed of it.

    The batch is trained on as any other, and nothing is drawn. In a run that resumes the adapters are those of the
    checkpoint.
    """

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Starts them where this is the first batch of all; `super().on_train_batch_start(...)` in a subclass's own."""
        if self.global_step == 0 and batch_idx == 0:
            start_adapters(self, batch)
        return None


def start_adapters(module: Any, batch: Mapping[str, Any]) -> None:
    """Starts adapters that wait for inputs, of policy and critic, with what is read of a batch on all processes.

    Nothing happens where none waits.

    Args:
        module: An `AlignmentModule`; without a Trainer there is one process.
        batch: As the module trains on it, on its device. Of prompts alone, the prompts are read.

    Raises:
        ValueError: If the batch holds fewer tokens than the rank, or nothing of it can be read.
    """
    for name, model in find_waiting(module).items():
        texts: list[Segments | None] = [*_texts(module, batch)]
        count = int(module.reduce(torch.tensor(len(texts), device=module.device), "max"))
        texts += [None] * (count - len(texts))
        found = input_directions(model, texts, lambda values: module.reduce(values, "sum"))
        if module._trainer is not None:
            found = module.trainer.strategy.broadcast(found)  # other processors round otherwise
        set_directions(model, found)
        rank_zero_info(f"  {name}: the adapters start from what their layers read of the first batch (EVA)")


def _texts(module: Any, batch: Mapping[str, Any]) -> list[Segments | None]:
    """What is read of a batch, in pieces as they are trained on; None: nothing of a piece."""
    size = None if module.automatic_optimization else module.micro_batch_size
    if SEGMENTS not in batch and module.segments(batch) is None:
        rows = _rows(module, batch)
        found = [Segments.from_labels(ids, ids, mask, reads="targets+last") for ids, mask in rows.split(size)]
    else:
        pieces = [batch] if size is None else cut(batch, size)
        found = [piece.get(SEGMENTS) or module.segments(piece) for piece in pieces]
    return [text if text.tokens else None for text in found]


class _Rows(NamedTuple):
    """Token ids `[rows, time]` and where they are real; None: everywhere."""

    ids: Tensor
    mask: Tensor | None

    def split(self, size: int | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Pieces of at most so many rows; None: all in one."""
        size = size or max(len(self.ids), 1)
        for start in range(0, len(self.ids), size):
            rows = slice(start, start + size)
            yield self.ids[rows], None if self.mask is None else self.mask[rows]


def _rows(module: Any, batch: Mapping[str, Any]) -> _Rows:
    for ids, mask in (("prompts", "prompt_attention_mask"), ("input_ids", "attention_mask")):
        if isinstance(batch.get(ids), Tensor):
            return _Rows(batch[ids], batch.get(mask))
    raise ValueError(
        f"lora.init='eva' reads `segments`, `prompts` or `input_ids` of a batch, and this one for "
        f"{type(module).__name__} holds {sorted(map(str, batch))}: use another init"
    )
