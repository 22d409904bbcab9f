import copy

import peft
import pytest
import torch
from torch import nn

from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.lora import adapter_is_identity, adapter_off, has_adapter
from alignment_modules.policies.merging import merged_state
from tests.models import MIXTRAL

TOKENS = torch.arange(1, 13).reshape(2, 6)


def policy(config, *, seed=0, **lora):
    torch.manual_seed(seed)
    return build_policy(PolicyConfig(config=config, dtype="float64", lora=LoraConfig(**lora)))


def train(model):
    """Moves the adapters away from zero, as training does."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_only_adapters_are_trainable_and_the_head_has_none(tiny_llama_config):
    model = policy(tiny_llama_config, r=4)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n} == {4}


def test_the_update_is_alpha_over_r(tiny_llama_config):
    model = train(policy(tiny_llama_config, r=4, alpha=12, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32, dtype=torch.float64)
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    torch.testing.assert_close(layer.eval()(x), layer.base_layer(x) + 3 * (x @ down.T) @ up.T)


def test_dropout_and_scale_options_reach_peft(tiny_llama_config):
    model = policy(tiny_llama_config, r=4, alpha=8, dropout=0.25, use_rslora=True, target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.scaling["default"] == 4.0


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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 0}, ["lora.r=0", "an integer from 1"]),
        ({"r": 1.5}, ["lora.r=1.5", "integer"]),
        ({"alpha": 0}, ["lora.alpha=0", "> 0"]),
        ({"dropout": 1.0}, ["lora.dropout=1.0", "[0, 1)"]),
        ({"target_modules": []}, ["lora.target_modules=[]", "all-linear"]),
        ({"target_modules": "nothing.*"}, ["lora.target_modules='nothing.*'", "q_proj"]),
        ({"target_modules": ["q_proj", "v_prj"]}, ["'v_prj'", "Did you mean 'v_proj'"]),
        ({"exclude_modules": ["zzz"]}, ["lora.exclude_modules", "'zzz'"]),
        ({"modules_to_save": ["hed"]}, ["lora.modules_to_save", "'hed'"]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ["lora.exclude_modules", "q_proj"]),
        ({"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, ["lora.modules_to_save", "q_proj"]),
        ({"modules_to_save": ["lm_head"]}, ["lora.modules_to_save", "lm_head", "tie_word_embeddings"]),
        ({"target_modules": ["embed_tokens"]}, ["lora.target_modules", "embed_tokens", "tie_word_embeddings"]),
    ],
)
def test_contradictions(tiny_llama_config, options, says):
    with pytest.raises(ValueError, match=r".") as caught:
        policy(tiny_llama_config, **options)
    for part in says:
        assert part in str(caught.value)


@pytest.fixture
def adapter_folder(llama_folder, tmp_path):
    """A trained adapter on the tiny Llama, written by peft alone, and the logits it should give."""
    base = build_policy(PolicyConfig(path=str(llama_folder)))
    model = train(peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


def test_an_adapter_folder_is_merged_into_its_base(adapter_folder):
    folder, wanted = adapter_folder
    model = build_policy(str(folder))
    assert not has_adapter(model)
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), wanted)
    assert model.name_or_path == ""


def test_a_second_adapter_starts_from_the_merged_model(adapter_folder):
    folder, wanted = adapter_folder
    model = build_policy(PolicyConfig(path=str(folder), lora=LoraConfig(r=2)))
    torch.testing.assert_close(logits(model), wanted)
    assert adapter_is_identity(model)


def test_broken_adapter_folders(adapter_folder, llama_folder):
    import json

    folder, _ = adapter_folder
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good, tensors = json.loads(file.read_text()), weights.read_bytes()

    def refused(*says, **changes):
        file.write_text(json.dumps({**good, **changes}))
        with pytest.raises(ValueError, match=r".") as caught:
            build_policy(str(folder))
        assert all(part in str(caught.value) for part in (str(folder), *says)), caught.value

    refused("names no base model", base_model_name_or_path=None)
    refused("/gone/base", "missing", base_model_name_or_path="/gone/base")
    refused("cannot be merged", r=8)
    refused("cannot be merged", "missing adapter keys", target_modules=["q_proj", "lm_head"])
    weights.write_bytes(tensors[:100])
    refused("cannot be merged")
    weights.unlink()
    refused("no adapter_model.safetensors")
    file.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json.*JSON"):
        build_policy(str(folder))


def test_an_adapter_is_not_merged_into_quantized_weights(adapter_folder, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: object())
    with pytest.raises(ValueError, match=r"policy.quantization='4bit'.*adapter"):
        build_policy(PolicyConfig(path=str(adapter_folder[0]), quantization="4bit", lora=LoraConfig()))
