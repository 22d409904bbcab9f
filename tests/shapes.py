"""Shapes of the tiny models, as dictionaries that `PolicyConfig(config=...)` and transformers take."""

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Two layers with grouped queries."""

LLAMA: dict[str, Any] = {"model_type": "llama", **SIZES, "initializer_range": 0.3}
"""A Llama whose head is not tied."""
