"""Quantized weights are read, trained through, copied and merged as what they stand for."""

import copy
import importlib.metadata
import importlib.util
import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment_modules.policies import fingerprint, frozen_companion
from alignment_modules.policies.adapters import adapter_off, merged_copy
from alignment_modules.policies.architecture import describe_size
from alignment_modules.policies.critic import build_critic
from alignment_modules.policies.export import export_policy
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.quantization import (
    PACKAGES,
    bytes_of,
    check_can_be_sent,
    count,
    dequantized,
    quantized_layers,
    stored_parts,
)
from alignment_modules.policies.weights import without_weights
from tests.models import quantized

pytest.importorskip("bitsandbytes")  # development dependencies on Linux
pytest.importorskip("torchao")

KINDS = pytest.mark.parametrize("kind", PACKAGES)
TOKENS = torch.arange(1, 13).reshape(2, 6)
BITS = {"4bit": 4.13, "8bit": 8.0, "int8_weight_only": 8.0}


def logits(model, *, train=False):
    with torch.no_grad():
        return model.train(train)(TOKENS).logits


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@KINDS
def test_every_linear_layer_but_the_head_is_quantized(tiny_llama, llama_folder, kind):
    model = build_policy(PolicyConfig(path=str(llama_folder), quantization=kind), trainable=False)
    names = {name for name, layer in tiny_llama.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert {name for name, _ in quantized_layers(model)} == names - {"lm_head"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    wanted = logits(tiny_llama)
    assert 1e-3 < float((logits(model) - wanted).norm() / wanted.norm()) < (0.8 if kind == "4bit" else 0.1)
    assert sum(map(count, model.parameters())) == sum(p.numel() for p in tiny_llama.parameters())
    assert describe_size(model).split(",")[1] == describe_size(tiny_llama).split(",")[1]


@KINDS
def test_what_a_layer_stands_for_is_what_it_computes(tiny_llama, tmp_path, kind):
    model = quantized(tiny_llama, kind, tmp_path)
    layer = model.base_model.model.model.layers[1].mlp.up_proj.base_layer.train()
    x = torch.randn(5, 32)
    stands_for = dequantized(layer, torch.float32)
    torch.testing.assert_close(layer(x), stands_for(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stands_for.weight, tiny_llama.model.layers[1].mlp.up_proj.weight, rtol=0, atol=0.5)


@KINDS
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_gradient_goes_through_the_base(tiny_llama, tmp_path, kind, mode):
    """Also in eval mode, in which log-probabilities of two models are compared, and after a pass without gradients."""
    model = quantized(tiny_llama, kind, tmp_path)
    twin = copy.deepcopy(merged_copy(model))  # the same numbers in full precision
    logits(model)

    def gradient(of):
        embedded = of.get_input_embeddings()(TOKENS).detach().requires_grad_()
        of.train(mode == "train")(inputs_embeds=embedded).logits.float().square().mean().backward()
        return embedded.grad

    rounds = kind == "8bit" and mode == "eval"  # the activations, too
    torch.testing.assert_close(
        gradient(model), gradient(twin), rtol=0.1 if rounds else 1e-4, atol=0.02 if rounds else 1e-6
    )
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


@KINDS
@pytest.mark.parametrize("adapter", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_merging_gives_what_was_trained_in_full_precision(tiny_llama, llama_folder, tmp_path, kind, adapter):
    torch.manual_seed(2)
    config = PolicyConfig(path=str(llama_folder), quantization=kind, lora=LoraConfig(r=2, **adapter))
    model = build_policy(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    before, state = fingerprint(model), logits(model, train=True)
    folder = export_policy(model, tmp_path / "export")
    assert fingerprint(model) == before
    config = json.loads((folder / "config.json").read_text())
    assert not [key for key in config if "quant" in key]
    exported = plain(folder)
    assert exported.dtype == torch.float32
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    torch.testing.assert_close(logits(exported), state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(merged_copy(model)), state, rtol=1e-4, atol=1e-4)


@KINDS
def test_a_layer_without_an_adapter_is_dequantized_too(llama_folder, tmp_path, kind):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model = build_policy(PolicyConfig(path=str(llama_folder), quantization=kind, lora=lora))
    exported = plain(export_policy(model, tmp_path / "export"))
    torch.testing.assert_close(logits(exported), logits(model, train=True), rtol=1e-4, atol=1e-4)


@KINDS
def test_in_bfloat16(llama_folder, tmp_path, kind):
    config = PolicyConfig(path=str(llama_folder), quantization=kind, dtype="bfloat16", lora=LoraConfig(r=2))
    model = build_policy(config)
    exported = plain(export_policy(model, tmp_path / "export"))
    assert exported.dtype == torch.bfloat16
    wanted = logits(model, train=True).float()
    assert float((logits(exported).float() - wanted).norm() / wanted.norm()) < 0.02


@KINDS
def test_the_adapter_alone(llama_folder, tmp_path, kind):
    import peft

    from alignment_modules.policies.quantization import loading_options

    model = quantized(None, kind, llama_folder)
    folder = export_policy(model, tmp_path / "adapter", lora="adapter")
    assert not list(folder.glob("model*"))
    base = AutoModelForCausalLM.from_pretrained(llama_folder, **loading_options(kind, torch.float32))
    stock = peft.PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(logits(stock, train=True), logits(model, train=True))


def test_layers_that_lie_on_their_side(tmp_path):
    config = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    torch.manual_seed(0)
    build_policy(PolicyConfig(config=config)).save_pretrained(tmp_path / "gpt2")
    model = quantized(None, "4bit", tmp_path / "gpt2")
    assert len(quantized_layers(model)) == 4
    exported = plain(export_policy(model, tmp_path / "export"))
    torch.testing.assert_close(logits(exported), logits(model), rtol=1e-4, atol=1e-4)


@KINDS
def test_fingerprints_copies_and_companions(tiny_llama, tmp_path, kind):
    model = quantized(tiny_llama, kind, tmp_path)
    before, wanted = fingerprint(model), logits(model)
    assert fingerprint(quantized(None, kind, tmp_path)) == before
    twin = copy.deepcopy(model)
    assert fingerprint(twin) == before
    assert torch.equal(logits(twin), wanted)
    reference = frozen_companion(None, model)  # of adapters that do something: a copy
    assert reference.module is not None
    assert reference.fingerprint() == before
    with torch.no_grad():
        next(p for p in reference.module.parameters() if p.requires_grad is False and p.is_floating_point()).mul_(1.5)
    assert reference.fingerprint() != before
    assert frozen_companion(PolicyConfig(path=str(tmp_path), quantization=kind), tiny_llama).fingerprint() != before


@KINDS
def test_fresh_adapters_switched_off_are_the_reference(llama_folder, kind):
    model = build_policy(PolicyConfig(path=str(llama_folder), quantization=kind, lora=LoraConfig(r=2)))
    assert frozen_companion(None, model).module is None
    base = build_policy(PolicyConfig(path=str(llama_folder), quantization=kind), trainable=False)
    with adapter_off(model):
        assert torch.equal(logits(model), logits(base))


@KINDS
def test_a_reference_that_moves_is_in_full_precision(tiny_llama, tmp_path, kind):
    model = quantized(tiny_llama, kind, tmp_path)
    moving = frozen_companion(None, model, saved=True)
    assert not quantized_layers(moving)
    torch.testing.assert_close(logits(moving.module), logits(model, train=True), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2.0)
    moving.refresh()
    torch.testing.assert_close(logits(moving.module), logits(model, train=True), rtol=1e-4, atol=1e-4)


@KINDS
def test_a_critic_is_a_copy_of_the_quantized_trunk(llama_folder, kind):
    model = build_policy(PolicyConfig(path=str(llama_folder), quantization=kind, lora=LoraConfig(r=2)))
    critic = build_critic(None, model)
    assert len(quantized_layers(critic)) == len(quantized_layers(model))
    assert {n.split(".")[-3] for n, p in critic.named_parameters() if p.requires_grad} >= {"lora_A", "lora_B"}
    assert any("score" in name and p.requires_grad for name, p in critic.named_parameters())


@KINDS
def test_a_head_of_one_number_is_not_quantized(llama_folder, kind):
    config = PolicyConfig(path=str(llama_folder), quantization=kind, head="scalar")
    reward = build_policy(config, trainable=False)
    assert "score" not in dict(quantized_layers(reward))
    assert len(quantized_layers(reward)) == 14
    assert reward(TOKENS[:1]).logits.shape == (1, 1)


@KINDS
def test_bytes_are_estimated_without_weights(llama_folder, kind):
    config = PolicyConfig(path=str(llama_folder), quantization=kind, lora=LoraConfig(r=2))
    with without_weights():
        shapes = build_policy(config)
    linear = sum(p.numel() for n, p in shapes.named_parameters() if ".base_layer." in n)
    found = sum(bytes_of(p) for n, p in shapes.named_parameters() if ".base_layer." in n)
    assert found == pytest.approx(linear * BITS[kind] / 8, rel=0.01)
    held = [layer.weight for _, layer in quantized_layers(build_policy(config))]
    small = [part for weight in held for part in stored_parts(weight) if not part.is_floating_point()]
    assert found == pytest.approx(sum(map(bytes_of, small)), rel=0.04)  # without scales


def test_the_cast_of_inputs_is_told_once(tiny_llama, tmp_path, caplog):
    model = quantized(tiny_llama, "8bit", tmp_path)
    with caplog.at_level(logging.WARNING):
        logits(model)
        logits(model)
    assert sum("will be cast" in record.getMessage() for record in caplog.records) <= 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantization": "int4_weight_only"}, ["'int4_weight_only'", "int8 weights alone", "int8_weight_only"]),
        ({"quantization": "float8_weight_only"}, ["'float8_weight_only'", "int8 weights alone"]),
        ({"quantization": "2bit"}, ["'2bit'", "4bit", "8bit", "int8_weight_only"]),
        ({"quantization": "4bit", "dtype": "float64"}, ["'4bit'", "float64", "bfloat16"]),
        ({"quantization": "8bit", "lora": None}, ["'8bit'", "lora"]),
    ],
)
def test_what_is_refused(llama_folder, changes, says):
    with pytest.raises(ValueError, match=r".") as caught:
        build_policy(PolicyConfig(**{"path": str(llama_folder), "lora": LoraConfig()} | changes))
    assert all(part in str(caught.value) for part in says), caught.value


@pytest.mark.parametrize(("kind", "package"), [("4bit", "bitsandbytes"), ("int8_weight_only", "torchao")])
def test_a_package_that_is_missing_or_too_old(monkeypatch, llama_folder, kind, package):
    config = PolicyConfig(path=str(llama_folder), quantization=kind, lora=LoraConfig())
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.9" if name == "peft" else version(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.15.0" if name == package else version(name))
    with pytest.raises(ImportError, match=rf"'{kind}' needs {package}>=0\.\d+.*0\.15\.0 is installed"):
        build_policy(config)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(ImportError, match=f"'{kind}' needs the package {package}: pip install"):
        build_policy(config)


def test_weights_that_cannot_be_sent_to_other_processes(tiny_llama, tmp_path):
    holder = torch.nn.Module()
    holder.policy, holder.teacher = tiny_llama, quantized(tiny_llama, "4bit", tmp_path)
    check_can_be_sent(holder)
    holder.teacher = quantized(None, "int8_weight_only", tmp_path)
    with pytest.raises(ValueError, match=r"teacher\.quantization='int8_weight_only' on several processes.*'8bit'"):
        check_can_be_sent(holder)


def test_a_folder_that_is_stored_quantized(tiny_llama, tmp_path):
    from alignment_modules.policies.quantization import loading_options

    tiny_llama.save_pretrained(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", **loading_options("4bit", torch.float32))
    model.save_pretrained(tmp_path / "stored")
    path = str(tmp_path / "stored")
    with pytest.raises(ValueError, match=r"stored quantized \(bitsandbytes\).*policy\.lora"):
        build_policy(path)
    with pytest.raises(ValueError, match=r"'4bit'.*stored quantized.*leave"):
        build_policy(PolicyConfig(path=path, quantization="4bit", lora=LoraConfig()))
    policy = build_policy(PolicyConfig(path=path, lora=LoraConfig(r=2)))
    again = quantized(None, "4bit", tmp_path / "full")
    with adapter_off(policy), adapter_off(again):
        assert torch.equal(logits(policy), logits(again))
    exported = plain(export_policy(policy, tmp_path / "export"))
    torch.testing.assert_close(logits(exported), logits(policy), rtol=1e-4, atol=1e-4)
    adapter = export_policy(policy, tmp_path / "adapter", lora="adapter")
    with pytest.raises(ValueError, match=r"stored quantized.*policy\.merge_adapter=false"):
        build_policy(PolicyConfig(path=str(adapter)), trainable=False)
    kept = build_policy(PolicyConfig(path=str(adapter), merge_adapter=False))
    assert torch.equal(logits(kept), logits(policy))
