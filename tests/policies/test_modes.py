import copy

import pytest
import torch
from torch import nn

from alignment_modules.policies.frozen import frozen_companion
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.modes import disable_dropout

TOKENS = torch.arange(1, 13).reshape(2, 6)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


ARCHITECTURES = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_dropout": 0.5,
        "initializer_range": 0.3,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 40,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 16,
        "initializer_range": 0.3,
        "resid_pdrop": 0.5,
        "embd_pdrop": 0.5,
        "attn_pdrop": 0.5,
    },
    "opt": {  # its layers call dropout with their own training flag
        "model_type": "opt",
        "vocab_size": 40,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 16,
        "dropout": 0.5,
        "init_std": 0.3,
    },
    "falcon": {
        "model_type": "falcon",
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_dropout": 0.5,
        "initializer_range": 0.3,
        "attention_dropout": 0.5,
    },
}


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, dropout=0.5)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_disable_dropout_with_checkpointing(architecture, lora):
    """Twice the same log-probabilities, layers recomputed, and the gradients of the plain model without dropout."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def run(checkpointing):
        torch.manual_seed(0)
        config = ARCHITECTURES[architecture]
        model = build_policy(
            PolicyConfig(config=config, dtype="float64", gradient_checkpointing=checkpointing, lora=lora)
        )
        if checkpointing:
            assert not torch.equal(logits(model), logits(model))  # the test sees dropout where there is some
        disable_dropout(model)
        disable_dropout(model)  # once more changes nothing
        calls = []
        layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
        norm = next(m for m in layer.modules() if "Norm" in type(m).__name__)
        norm.register_forward_hook(lambda *_: calls.append(1))
        first = model(TOKENS, use_cache=False).logits
        second = model(TOKENS, use_cache=False).logits
        assert torch.equal(first, second)
        assert torch.equal(first, logits(model))
        calls.clear()
        first.square().mean().backward()
        return first, len(calls), [p.grad for p in model.parameters() if p.requires_grad]

    plain, none, gradients = run(False)
    checkpointed, recomputed, others = run(True)
    assert (none, recomputed) == (0, 1)
    assert torch.equal(plain, checkpointed)
    assert gradients
    for left, right in zip(gradients, others, strict=True):
        torch.testing.assert_close(left, right)


def test_disable_dropout_survives_a_copy_and_a_return_to_training():
    model = build_policy(PolicyConfig(config=ARCHITECTURES["opt"], gradient_checkpointing=True))
    disable_dropout(model)
    twin = copy.deepcopy(model)
    layer, other = model.model.decoder.layers[0], twin.model.decoder.layers[0]
    assert other._gradient_checkpointing_func.args[0] is other is not layer
    assert torch.equal(twin(TOKENS).logits, model(TOKENS).logits)
    model.train()
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    model.eval()
    assert torch.equal(twin(TOKENS).logits, model(TOKENS).logits)
    assert not any(m.training for m in frozen_companion(None, model).modules())


def test_disable_dropout_of_a_plain_module():
    policy = nn.Sequential(nn.Embedding(40, 8), nn.Dropout(0.5), nn.Linear(8, 40))
    disable_dropout(policy)
    assert not policy.training
    assert torch.equal(policy(TOKENS), policy(TOKENS))
