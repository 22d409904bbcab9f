"""In the last decoder layer only the predicting tokens need the feed-forward block.

After the last attention no token looks at another, and the head reads the predicting tokens alone. Their neighbours
(all of a prompt but its last token) may leave the block out: from there on their hidden states are wrong, and unread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.layers import decoder_layers

# Leave the block alone where it would be spared fewer tokens than this share.
_WORTHWHILE = 0.1


def find_feed_forward(model: Any) -> nn.Module | None:
    """Finds the block that works on each token by itself at the end of a decoder.

    Args:
        model: A causal language model of transformers.

    Returns:
        The last layer's `mlp`, or None if the model is not built like that. Whether the block may be given fewer tokens
        is for a comparison of numbers to say.
    """
    layers = decoder_layers(model)
    block = getattr(layers[-1], "mlp", None) if layers else None
    return block if isinstance(block, nn.Module) else None


def feed_forward_on(model: Any, rows: Tensor, tokens: int) -> AbstractContextManager[None]:
    """Within this context the last layer's feed-forward block is given `rows` alone.

    Nothing happens where that spares little, and where the layer's forward pass runs a second time in the backward pass
    (checkpointing) or is compiled: the hooks would be gone by then.

    Args:
        model: A model for which `find_feed_forward` finds a block.
        rows: `[needed]` int64, distinct places in the row.
        tokens: Length of the row.

    Returns:
        The context manager.
    """
    block = find_feed_forward(model)
    if block is None or len(rows) > (1 - _WORTHWHILE) * tokens or _runs_again(model):
        return nullcontext()
    return _hooked(block, rows)


def _runs_again(model: Any) -> bool:
    layer = decoder_layers(model)[-1]
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in (model.base_model, layer))
    wrapped = type(layer).__name__ == "CheckpointWrapper"
    compiled = any(module._compiled_call_impl is not None for module in (model, model.base_model, layer))
    # A layer may checkpoint while the model around it is in eval mode (see `disable_dropout`), so modes are not asked.
    return (torch.is_grad_enabled() and (wrapped or checkpointed)) or compiled


@contextmanager
def _hooked(block: nn.Module, rows: Tensor) -> Iterator[None]:
    width = 0

    def reduce(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal width
        (hidden,) = inputs
        width = hidden.shape[1]
        return (hidden.index_select(1, rows),)

    def restore(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.new_zeros(1, width, output.shape[-1]).index_copy(1, rows, output)

    handles = (block.register_forward_pre_hook(reduce), block.register_forward_hook(restore))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
