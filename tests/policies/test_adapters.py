import copy

import peft
import pytest
import torch
from torch import nn

from alignment_modules.policies.adapters import adapter_is_identity, adapter_off, has_adapter, merged_state
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from tests.models import MIXTRAL
from tests.policies.carrying import logits, policy, train


def test_adapter_off_is_the_base_and_restores_every_flag(tiny_llama_config):
    torch.manual_seed(0)
    base = build_policy(PolicyConfig(config=tiny_llama_config, dtype="float64"))
    model = train(policy(tiny_llama_config))
    frozen = next(p for p in model.parameters() if p.requires_grad)
    frozen.requires_grad_(False)  # an odd choice that must survive
    before = [p.requires_grad for p in model.parameters()]
    adapted = logits(model)

    def block():
        with adapter_off(model) as off:
            assert off is model
            assert torch.equal(logits(model), logits(base))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        block()
    assert [p.requires_grad for p in model.parameters()] == before
    assert torch.equal(logits(model), adapted)
    assert not torch.equal(adapted, logits(base))


def test_adapter_off_leaves_an_adapter_off_that_was_off(tiny_llama_config):
    model = train(policy(tiny_llama_config))
    with model.disable_adapter():
        off = logits(model)
        with adapter_off(model):
            pass
        assert torch.equal(logits(model), off)


@pytest.mark.parametrize("inside", [".experts.base_layer.", ".experts.lora_"])
def test_adapters_inside_of_others_are_part_of_the_switch(inside):
    """Of a mixture's experts each matrix has an adapter around that of the former."""
    torch.manual_seed(0)
    base = build_policy(PolicyConfig(config=MIXTRAL), trainable=False)
    torch.manual_seed(0)
    model = build_policy(PolicyConfig(config=MIXTRAL, lora=LoraConfig(r=2)))
    assert adapter_is_identity(model)
    moved = [p for name, p in model.named_parameters() if p.requires_grad and inside in name]
    with torch.no_grad():
        for parameter in moved:
            parameter += 1.0
    assert moved
    assert not adapter_is_identity(model)
    assert not torch.allclose(logits(model), logits(base))
    flags = [p.requires_grad for p in model.parameters()]
    with adapter_off(model):
        assert torch.equal(logits(model), logits(base))
    assert [p.requires_grad for p in model.parameters()] == flags


def test_modules_to_save_are_part_of_the_switch(tiny_llama_config):
    config = {**tiny_llama_config, "tie_word_embeddings": False}
    torch.manual_seed(0)
    base = build_policy(PolicyConfig(config=config, dtype="float64"))
    model = policy(config, modules_to_save=["lm_head"])
    assert adapter_is_identity(model)
    train(model)
    assert not adapter_is_identity(model)
    with adapter_off(model):
        assert torch.equal(logits(model), logits(base))


def test_identity(tiny_llama_config, tiny_llama):
    assert not has_adapter(tiny_llama)
    model = policy(tiny_llama_config)
    assert has_adapter(model)
    assert adapter_is_identity(model)
    model.base_model.model.model.norm.weight.requires_grad_(True)  # the base would move with training
    assert not adapter_is_identity(model)
    assert not adapter_is_identity(train(policy(tiny_llama_config)))
    ia3 = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    assert not adapter_is_identity(peft.get_peft_model(tiny_llama, ia3))


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_merging_beside_the_live_model(tiny_llama_config, extra):
    model = train(policy(tiny_llama_config, r=4, **extra))
    before, state = logits(model), copy.deepcopy(model.state_dict())
    _, merged = merged_state(model)
    torch.manual_seed(9)
    fresh = build_policy(PolicyConfig(config=tiny_llama_config, dtype="float64"))
    fresh.load_state_dict(merged, strict=True)
    torch.testing.assert_close(logits(fresh), before)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_merging_refuses_weights_that_are_not_finite(tiny_llama_config):
    model = policy(tiny_llama_config)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    nn.init.constant_(layer.lora_B["default"].weight, float("nan"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        merged_state(model)


def test_gpt2_keeps_its_transposed_layers(recwarn):
    config = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = train(policy(config, r=2))
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
    _, merged = merged_state(model)
    fresh = build_policy(PolicyConfig(config=config, dtype="float64"))
    fresh.load_state_dict(merged)
    torch.testing.assert_close(logits(fresh), logits(model))
