"""How much context a model takes: at all, and before its numbers depend on the length of the longest row beside it."""

import weakref
from typing import Any

from torch import nn

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


# What models call the table of their learned positions.
_POSITION_TABLES = ("wpe", "embed_positions", "position_embedding", "position_embeddings", "pos_emb")
_table_sizes: weakref.WeakKeyDictionary[nn.Module, int | None] = weakref.WeakKeyDictionary()


def check_length(model: nn.Module, tokens: int, what: str) -> None:
    """Refuses a row that is longer than a model's table of learned positions, in which it would look beyond the end.

    Rotary and other computed positions have no end and are not checked.

    Args:
        model: Any module.
        tokens: Tokens of the longest row.
        what: What the row is made of, for the message.

    Raises:
        ValueError: If there is a table and it is too short; the message names both lengths.
    """
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{what} of {tokens} tokens does not fit {type(model).__name__}, which has learned positions for {limit} "
            "(max_position_embeddings or n_positions of its configuration): shorten the data (max_length) or the "
            "completions (max_completion_length), or use another model"
        )


def context_length(model: Any) -> int | None:
    """The context that a model is made for, in tokens; None: its configuration does not say.

    Args:
        model: Any module.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    told = getattr(text, "max_position_embeddings", None)
    limits = [limit for limit in (told, position_limit(model)) if isinstance(limit, int) and limit > 0]
    return min(limits, default=None)


def position_limit(model: nn.Module) -> int | None:
    """Longest row, in tokens, that a model's table of learned positions has room for; None: it has no such table."""
    if model not in _table_sizes:
        _table_sizes[model] = _table_size(model)
    return _table_sizes[model]


def _table_size(model: nn.Module) -> int | None:
    sizes = [
        (name, module.num_embeddings)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES
    ]
    config = getattr(model, "config", None)
    if not sizes or config is None:
        return None
    # Some tables hold a few rows more than there are positions.
    limit = getattr(config, "max_position_embeddings", None)
    return min([size for _, size in sizes] + ([limit] if isinstance(limit, int) else []))
