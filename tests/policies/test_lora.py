import pytest
import torch

from tests.policies.carrying import policy, train


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
