"""The layers that a decoder repeats: what is compiled and recomputed one by one."""

from __future__ import annotations

from typing import Any

from torch import nn


def decoder_layers(model: Any) -> list[nn.Module]:
    """The repeated layers of a decoder, in the order in which they run.

    Args:
        model: A causal language model or sequence classifier of transformers (what `language_model` gives), or None.

    Returns:
        The entries of the first list of modules that holds as many as the configuration's `num_hidden_layers`; none
        where there is no such list.
    """
    if model is None:
        return []
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    return next((list(layers) for layers in lists if len(layers) == count), [])
