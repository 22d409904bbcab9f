"""Adapters that start from a part of their base's weights: the same as peft's own, on a base that stays."""

import copy
import json

import peft
import pytest
import torch

from alignment_modules.policies.adapter_start import is_of_start
from alignment_modules.policies.adapters import START, adapter_is_identity, adapter_off, lora_layers, merged_state
from alignment_modules.policies.export import export_policy
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.lora import add_lora
from alignment_modules.policies.weights import without_weights
from tests.policies.carrying import TOKENS, logits, train

INITS = pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])


def adapted(model, init, **options):
    torch.manual_seed(3)
    return add_lora(copy.deepcopy(model), LoraConfig(r=4, alpha=8, init=init, **options))


def step(model, rate=0.01):
    """One step of gradient descent on the tokens' likelihood."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.eval()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    return model


@INITS
def test_the_policy_starts_as_its_base_which_stays(tiny_llama, init):
    model, before = adapted(tiny_llama, init), copy.deepcopy(tiny_llama.state_dict())
    torch.testing.assert_close(logits(model), logits(tiny_llama), atol=2e-5, rtol=0)
    assert adapter_is_identity(model)
    step(model)
    assert not adapter_is_identity(model)
    assert float((logits(model) - logits(tiny_llama)).abs().max()) > 1e-3
    with adapter_off(model):
        assert torch.equal(logits(model), logits(tiny_llama))
    base = {key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(value, base[key]) for key, value in before.items())


@INITS
def test_a_step_is_that_of_pefts_own(tiny_llama, init):
    ours = adapted(tiny_llama, init)
    torch.manual_seed(3)
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    theirs = peft.get_peft_model(copy.deepcopy(tiny_llama), peft.LoraConfig(init_lora_weights=init, **options))
    if init == "pissa_niter_16":  # drawn in another order
        for (_, mine), (_, other) in zip(lora_layers(ours), lora_layers(theirs), strict=True):
            weight = other.base_layer.weight.data + other.get_delta_weight("default")
            for pair in ("lora_A", "lora_B"):
                getattr(other, pair)["default"].weight.data = getattr(mine, pair)["default"].weight.data.clone()
            other.base_layer.weight.data = weight - other.get_delta_weight("default")
    moved = [step(model, rate=0.1) for model in (ours, theirs)]
    states = [merged_state(model)[1] for model in moved]
    start = tiny_llama.state_dict()
    assert max(float((states[0][key] - start[key]).abs().max()) for key in start) > 1e-3
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], atol=2e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


def test_the_start_is_the_principal_part(tiny_llama):
    for _, layer in lora_layers(adapted(tiny_llama, "pissa")):
        left, values, right = torch.linalg.svd(layer.base_layer.weight.detach().double())
        wanted = left[:, :4] * values[:4] @ right[:4]
        torch.testing.assert_close(layer.get_delta_weight("default").double(), wanted, atol=2e-5, rtol=0)


def test_only_the_adapters_train_whatever_peft_switches(tiny_llama):
    model = adapted(tiny_llama, "pissa")

    def trained():
        return {name for name, p in model.named_parameters() if p.requires_grad}

    before = trained()
    assert before
    assert all(".default." in name for name in before)
    with model.disable_adapter():
        pass
    assert trained() == before
    start = [p.clone() for name, p in model.named_parameters() if is_of_start(name)]
    step(model)
    now = [p for name, p in model.named_parameters() if is_of_start(name)]
    assert start
    assert all(map(torch.equal, start, now))


@INITS
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_saved_adapter_is_plain_lora_on_the_base_as_it_is(llama_folder, tmp_path, init, use_rslora):
    options = LoraConfig(r=4, alpha=6, init=init, use_rslora=use_rslora, target_modules=["q_proj", "up_proj"])
    model = train(build_policy(PolicyConfig(path=str(llama_folder), lora=options)))
    wanted = logits(model)
    folder = export_policy(model, tmp_path / "adapter", lora="adapter")
    options = json.loads((folder / "adapter_config.json").read_text())
    assert (options["r"], options["init_lora_weights"]) == (8, True)
    plain = peft.PeftModel.from_pretrained(build_policy(str(llama_folder)), folder)
    torch.testing.assert_close(logits(plain), wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits(build_policy(str(folder))), wanted, atol=2e-5, rtol=1e-5)
    whole = build_policy(str(export_policy(model, tmp_path / "whole")))
    torch.testing.assert_close(logits(whole), wanted, atol=2e-5, rtol=1e-5)


def test_a_base_in_16_bits_is_rounded_once(tiny_llama):
    model = train(adapted(tiny_llama.bfloat16(), "pissa"))
    _, state = merged_state(model)
    name, layer = lora_layers(model.get_base_model())[0]
    update = layer.get_delta_weight("default") + layer.get_delta_weight(START)
    assert torch.equal(state[f"{name}.weight"], layer.base_layer.weight + update.to(torch.bfloat16))


def test_transposed_layers():
    config = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    torch.manual_seed(0)
    base = build_policy(PolicyConfig(config=config))
    model = adapted(base, "pissa")
    torch.testing.assert_close(logits(model), logits(base), atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match=r"lora.init='olora' is for linear layers, .*c_attn.* is a Conv1D"):
        adapted(base, "olora")


def test_shapes_alone(llama_folder):
    with without_weights():
        model = build_policy(PolicyConfig(path=str(llama_folder), lora=LoraConfig(r=4, init="pissa")))
    assert adapter_is_identity(model)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dropout": 0.1}, "lora.dropout=0.1 with lora.init='pissa'"),
        ({"use_dora": True}, "lora.use_dora=True with lora.init='pissa'"),
        ({"r": 17}, r"lora.r=17 with lora.init='pissa': .*k_proj.* has the weight 16 x 32, of rank 16 at most"),
        ({"init": "svd"}, "lora.init='svd'.*kaiming.*pissa_niter_16"),
    ],
)
def test_refuses(tiny_llama, options, says):
    with pytest.raises(ValueError, match=says):
        add_lora(tiny_llama, LoraConfig(**{"init": "pissa", **options}))


def test_a_quantized_base_is_refused(llama_folder, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: object())
    with pytest.raises(ValueError, match=r"policy.lora.init='pissa' with policy.quantization='4bit'"):
        build_policy(PolicyConfig(path=str(llama_folder), quantization="4bit", lora=LoraConfig(init="pissa")))
