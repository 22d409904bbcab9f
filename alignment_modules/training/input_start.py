"""Adapters that start from what their layers read (`lora.init: eva`), which a run knows with its first batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        tokens = sum(text.tokens for text in texts if text is not None)
        rank_zero_info(f"  {name}: adapters start from what their layers read of {tokens} tokens (EVA)")


def _texts(module: Any, batch: Mapping[str, Any]) -> list[Segments | None]:
    """What is read of a batch, in pieces as they are trained on; None: nothing of a piece."""
    size = None if module.automatic_optimization else module.micro_batch_size
    found = [_text(module, piece) for piece in ([batch] if size is None else cut(batch, size))]
    return [text if text.tokens else None for text in found]


def _text(module: Any, piece: Mapping[str, Any]) -> Segments:
    segments = piece.get(SEGMENTS) or module.segments(piece)
    if segments is not None:
        return segments
    for ids, mask in (("prompts", "prompt_attention_mask"), ("input_ids", "attention_mask")):
        if isinstance(tokens := piece.get(ids), Tensor):
            return Segments.from_labels(tokens, tokens, piece.get(mask), reads="targets+last")
    raise ValueError(
        f"lora.init='eva' reads `segments`, `prompts` or `input_ids` of a batch, and this one for "
        f"{type(module).__name__} holds {sorted(map(str, piece))}: use another init"
    )
