"""The prompts that a module without rollouts completes, to show what it has learnt."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from alignment_modules.rollouts.prompts import Prompts


def prompts_to_show(trainer: L.Trainer, module: Any, texts: list[str] | None, count: int) -> Mapping[str, Any] | None:
    """A batch of prompts, on the host: the given texts, else those of the first validation rows.

    Args:
        trainer: Its datamodule is asked for `first_prompts(count)`.
        module: Has a `codec` that turns text into tokens.
        texts: Prompts as text, completed as they stand; None: the validation rows'.
        count: How many.

    Returns:
        The batch; None, and a warning, where there are no prompts.

    Raises:
        ValueError: If texts are given and there is no tokenizer.
    """
    if texts is not None:
        module.codec.require_tokenizer()
        prompts = Prompts.from_rows([module.codec.encode(text) for text in texts[:count]], torch.device("cpu"))
        index = list(range(len(texts[:count])))
        return {"prompts": prompts.ids, "prompt_attention_mask": prompts.mask, "index": index}
    first = getattr(getattr(trainer, "datamodule", None), "first_prompts", None)
    batch = first(count) if callable(first) else None
    if batch is None:
        rank_zero_warn("SampleTable shows nothing: there are no validation rows with a prompt; give it `prompts`")
    return batch
