"""How much context a model takes before its numbers depend on the length of the longest row beside it."""

from typing import Any

# Rotary embeddings of these types change all positions' angles once a row is longer than the original context.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def length_limit(model: Any) -> int | None:
    """Longest row, in tokens, up to which a model's log-probabilities do not depend on its neighbours' lengths.

    Beyond it each row has to be computed alone: transformers chooses the angles by the longest row of a batch.

    Args:
        model: Any module.

    Returns:
        The original context of a model with dynamic or long rotary embeddings; None: there is no such limit.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    config = config.get_text_config()
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]  # some have one per layer type
    limits = [
        kind.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type", kind.get("type")) in _LENGTH_DEPENDENT
    ]
    return min(limits, default=None)
