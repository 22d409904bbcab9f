"""Fixtures shared by all tests: one tiny model and one tiny tokenizer."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}


@pytest.fixture
def tiny_llama():
    """A fresh two-layer Llama (grouped queries, tied head, vocabulary of 40) in eval mode, float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA)).eval()


@pytest.fixture
def tiny_llama_config():
    """The dictionary that `PolicyConfig(config=...)` takes for the same model."""
    return dict(TINY_LLAMA)
