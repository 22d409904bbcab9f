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


@pytest.fixture
def train():
    """Fits a module on a list of batches without files or bars; returns the Trainer."""
    import lightning as L

    def fit(module, batches, **options):
        settings = {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
        trainer = L.Trainer(**(settings | options))
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        return trainer

    return fit


@pytest.fixture
def update(train):
    """The change of every trainable weight by one SGD step of rate 1 over the micro-batches: minus the gradient."""
    import copy

    def change(make_module, batches, **options):
        module = make_module(optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
        before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        if module.automatic_optimization:
            options.setdefault("accumulate_grad_batches", len(batches))
        train(module, copy.deepcopy(batches), **options)
        return {name: p.detach() - before[name] for name, p in module.named_parameters() if p.requires_grad}

    return change


@pytest.fixture
def assert_same():
    """Compares two dictionaries of tensors to a tolerance, and that they are not all zero."""

    def compare(first, second, tolerance=1e-5):
        assert first.keys() == second.keys()
        assert max(float(value.abs().max()) for value in first.values()) > 10 * tolerance
        for name in first:
            torch.testing.assert_close(
                first[name], second[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )

    return compare
