import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import alignment_modules
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.tokenizers import check_vocabulary, load_tokenizer

TOKENS = torch.arange(1, 13).reshape(2, 6)


class Taker:
    """Stands for a module of the command line."""

    def __init__(self, policy: str | PolicyConfig | nn.Module, beta: float = 0.1):
        self.policy = policy


def parse(*arguments):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Taker, "model")
    parsed = parser.parse_args([*arguments])
    return getattr(parser, "instantiate", parser.instantiate_classes)(parsed).model.policy


NAME = f"--model={Taker.__module__}.Taker"


def test_a_module_is_returned_as_it_is(tiny_llama):
    assert build_policy(tiny_llama) is tiny_llama
    assert not tiny_llama.training


def test_a_fresh_model_follows_the_global_seed(tiny_llama_config):
    torch.manual_seed(1)
    first = build_policy(PolicyConfig(config=tiny_llama_config))
    torch.manual_seed(1)
    second = build_policy({"config": tiny_llama_config})
    third = build_policy(PolicyConfig(config=tiny_llama_config))
    assert first.training
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)
    assert tiny_llama_config["model_type"] == "llama"  # the caller's dictionary is left alone


def test_a_fresh_model_has_no_token_ids_of_somebody_elses_vocabulary(tiny_llama_config):
    model = build_policy(PolicyConfig(config=tiny_llama_config))
    assert model.config.eos_token_id is None
    assert model.generation_config.eos_token_id is None
    model = build_policy(PolicyConfig(config={**tiny_llama_config, "eos_token_id": 7}))
    assert model.generation_config.eos_token_id == 7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtype(tiny_llama_config, llama_folder, dtype):
    fresh = build_policy(PolicyConfig(config=tiny_llama_config, dtype=dtype))
    loaded = build_policy(PolicyConfig(path=str(llama_folder), dtype=dtype))
    assert {p.dtype for p in [*fresh.parameters(), *loaded.parameters()]} == {getattr(torch, dtype)}


def test_dtype_auto_is_the_stored_one(tiny_llama, tmp_path):
    tiny_llama.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert build_policy(PolicyConfig(path=str(tmp_path / "half"), dtype="auto")).dtype == torch.bfloat16


def test_a_folder_gives_the_weights_in_it(tiny_llama, llama_folder):
    model = build_policy(str(llama_folder))
    assert torch.equal(model(TOKENS).logits, tiny_llama(TOKENS).logits)
    assert model.training
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_attention_is_passed_on(tiny_llama_config, llama_folder):
    for source in ({"config": tiny_llama_config}, {"path": str(llama_folder)}):
        model = build_policy(PolicyConfig(**source, attn_implementation="eager"))
        assert model.config._attn_implementation == "eager"


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(tiny_llama_config):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = build_policy(PolicyConfig(config=tiny_llama_config, gradient_checkpointing=checkpointing))
        calls = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        model(TOKENS, use_cache=False).logits.square().mean().backward()
        return len(calls), [p.grad for p in model.parameters()]

    plain_calls, plain = gradients(False)
    calls, recomputed = gradients(True)
    assert (plain_calls, calls) == (1, 2)
    for left, right in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(left, right)


def test_checkpointing_wants_no_gradient_of_the_embeddings_output(tiny_llama_config):
    model = build_policy(PolicyConfig(config=tiny_llama_config, gradient_checkpointing=True)).requires_grad_(False)
    assert not model(TOKENS).logits.requires_grad
    lora = LoraConfig(target_modules=["q_proj"])
    model = build_policy(PolicyConfig(config=tiny_llama_config, gradient_checkpointing=True, lora=lora))
    assert not model.requires_grad_(False)(TOKENS).logits.requires_grad


def test_the_command_line_and_yaml_reach_every_option(tmp_path):
    assert parse(NAME, "--model.policy", "runs/sft") == "runs/sft"
    assert parse(NAME, "--model.policy.path", "runs/sft", "--model.policy.lora.r", "8") == PolicyConfig(
        path="runs/sft", lora=LoraConfig(r=8)
    )
    assert parse(NAME, "--model.policy.config.model_type", "llama") == PolicyConfig(config={"model_type": "llama"})
    text = f"""
model:
  class_path: {Taker.__module__}.Taker
  init_args:
    policy:
      config: {{model_type: llama, vocab_size: 20, tie_word_embeddings: true}}
      dtype: bfloat16
      gradient_checkpointing: true
      lora: {{r: 4, target_modules: [q_proj, v_proj]}}
"""
    (tmp_path / "config.yaml").write_text(text)
    assert parse("--config", str(tmp_path / "config.yaml")) == PolicyConfig(
        config={"model_type": "llama", "vocab_size": 20, "tie_word_embeddings": True},
        dtype="bfloat16",
        gradient_checkpointing=True,
        lora=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )


def test_importing_costs_no_transformers():
    # The package's own __init__ imports Lightning, whose torchmetrics imports transformers when it is installed.
    code = (
        "import sys, types; parent = sys.modules['alignment_modules'] = types.ModuleType('alignment_modules'); "
        f"parent.__path__ = [{str(Path(alignment_modules.__file__).parent)!r}]; "
        "import alignment_modules.policies.load, alignment_modules.policies.export, "
        "alignment_modules.policies.frozen; print({'transformers', 'peft', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


LLAMA = {"model_type": "llama", "vocab_size": 40, "hidden_size": 32}


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (PolicyConfig(), ["exactly one of 'path'", "neither"]),
        (PolicyConfig(path="x", config=LLAMA), ["exactly one of 'path'", "both"]),
        (PolicyConfig(path=" "), ["policy.path=' '", "empty"]),
        (PolicyConfig(config=LLAMA, dtype="fp32"), ["policy.dtype='fp32'", "float32", "bfloat16"]),
        (PolicyConfig(config=LLAMA, dtype="auto"), ["policy.dtype='auto'", "path"]),
        (PolicyConfig(config=LLAMA, revision="main"), ["policy.revision='main'", "config"]),
        (PolicyConfig(config=LLAMA, trust_remote_code=True), ["policy.trust_remote_code=True", "config"]),
        (PolicyConfig(config=LLAMA, quantization="4bit", lora=LoraConfig()), ["policy.quantization='4bit'", "path"]),
        (PolicyConfig(path="some/model", quantization="4bit"), ["policy.quantization='4bit'", "lora"]),
        (PolicyConfig(path="some/model", quantization="2bit", lora=LoraConfig()), ["'2bit'", "4bit", "8bit"]),
        (PolicyConfig(config={"vocab_size": 3}), ["policy.config.model_type=None"]),
        (PolicyConfig(config={"model_type": "lama"}), ["policy.config.model_type='lama'", "'llama'"]),
        (PolicyConfig(config={"model_type": "vit"}), ["causal language model"]),
        (PolicyConfig(config={**LLAMA, "hiden_size": 3}), ["'hiden_size'=3", "Did you mean 'hidden_size'"]),
        (PolicyConfig(config={**LLAMA, "qqq": 3}), ["'qqq'=3", "vocab_size"]),
        (PolicyConfig(config={**LLAMA, "hidden_size": "big"}), ["hidden_size", "expected int", "'big'"]),
        (PolicyConfig(config={**LLAMA, "hidden_size": 33}), ["33", "multiple"]),
        (PolicyConfig(config={**LLAMA, "num_attention_heads": 0}), ["policy.config", "llama"]),
        (PolicyConfig(config=LLAMA, attn_implementation="magic"), ["magic"]),
        ({"pth": "x"}, ["'pth'", "'path'"]),
        (3, ["policy=3", "int", "PolicyConfig"]),
        ("/no/such/folder", ["policy.path='/no/such/folder'", "missing"]),
        ("./gone", ["policy.path='./gone'", "missing"]),
        ("runs/sft/export", ["policy.path='runs/sft/export'", "missing"]),
        ("runs/sft", ["policy.path='runs/sft'", "neither a folder"]),
    ],
)
def test_what_is_refused(policy, says):
    with pytest.raises(ValueError, match=r".") as caught:
        build_policy(policy)
    for part in says:
        assert part in str(caught.value)


def test_legacy_and_mapped_keys_are_known():
    llama = {**LLAMA, "num_attention_heads": 2, "num_hidden_layers": 1, "rope_theta": 500.0}
    assert build_policy({"config": llama}).config.rope_parameters["rope_theta"] == 500.0
    gpt2 = {"model_type": "gpt2", "vocab_size": 20, "hidden_size": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    assert build_policy({"config": gpt2}).config.n_embd == 16


def test_quantization_without_bitsandbytes(monkeypatch, llama_folder):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a))
    with pytest.raises(ImportError, match="'8bit' needs the package bitsandbytes"):
        build_policy(PolicyConfig(path=str(llama_folder), quantization="8bit", lora=LoraConfig()))


def test_broken_folders(llama_folder, tmp_path):
    def refused(*says):
        with pytest.raises(ValueError, match=r".") as caught:
            build_policy(str(llama_folder))
        assert all(part in str(caught.value) for part in (str(llama_folder), *says)), caught.value

    config, weights = llama_folder / "config.json", llama_folder / "model.safetensors"
    good_config, good_weights = config.read_bytes(), weights.read_bytes()

    weights.write_bytes(good_weights[: len(good_weights) // 2])
    refused()
    weights.rename(llama_folder / "pytorch_model.bin")
    refused("no *.safetensors", "pytorch_model.bin")
    weights.write_bytes(good_weights)
    config.unlink()
    refused("no config.json", "model.safetensors")
    config.write_text("{")
    refused()
    config.write_text(json.dumps({"model_type": "vit"}))
    refused("causal language model")
    config.write_text(json.dumps({"model_type": "custom", "auto_map": {"AutoConfig": "c.C"}}))
    refused()
    config.write_text(json.dumps({**json.loads(good_config), "num_hidden_layers": 3}))
    refused("9 weights", "missing", "model.layers.2")
    config.write_text(json.dumps({**json.loads(good_config), "intermediate_size": 56}))
    refused()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="a file, not a folder"):
        build_policy(str(file))
    with pytest.raises(ValueError, match=r"policy.revision='main' has no effect for the local folder"):
        build_policy(PolicyConfig(path=str(llama_folder), revision="main"))


def test_pickled_weights_are_never_read(tiny_llama, llama_folder):
    (llama_folder / "model.safetensors").unlink()
    torch.save(tiny_llama.state_dict(), llama_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not loaded"):
        build_policy(str(llama_folder))


def test_tokenizer(llama_folder, tokenizer):
    loaded = load_tokenizer(str(llama_folder))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token_id, loaded.pad_token_id) == (30, 31)


def test_tokenizer_errors(llama_folder, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer='/no/folder/here' is missing"):
        load_tokenizer("/no/folder/here")
    with pytest.raises(ValueError, match=r"tokenizer='no/folder': neither a folder .* nor on the hub"):
        load_tokenizer("no/folder")
    (llama_folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=str(llama_folder)):
        load_tokenizer(str(llama_folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama_folder / name).unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer .*config\.json"):
        load_tokenizer(str(llama_folder))


def test_adapters_without_tokenizer_that_name_each_other(tmp_path):
    names = ("first", "second")
    for name, base in zip(names, reversed(names), strict=True):
        (tmp_path / name).mkdir()
        config = json.dumps({"base_model_name_or_path": str(tmp_path / base)})
        (tmp_path / name / "adapter_config.json").write_text(config)
    with pytest.raises(ValueError, match=r"second.*holds no tokenizer.*leads back to it"):
        load_tokenizer(str(tmp_path / "first"))


@pytest.mark.parametrize(("kind", "hinted"), [("module", True), ("adapter", False)])
def test_the_hint_at_a_plain_modules_export(tmp_path, kind, hinted):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "alignment_modules.json").write_text(json.dumps({"format": kind}))
    with pytest.raises(ValueError, match=r"has no config.json") as refused:
        build_policy(str(tmp_path))
    assert ("the export of a plain module" in str(refused.value)) == hinted


def test_vocabulary(tiny_llama, tokenizer):
    check_vocabulary(tiny_llama, tokenizer)
    tokenizer.add_tokens([f"x{i}" for i in range(7)])  # 33 + 7 = 40, just fits
    check_vocabulary(tiny_llama, tokenizer)
    tokenizer.add_tokens(["one more"])
    with pytest.raises(ValueError, match=r"41 ids .*embeddings for 40"):
        check_vocabulary(tiny_llama, tokenizer)
    check_vocabulary(nn.Linear(2, 2), tokenizer)  # tells no size


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_weights_stay_in_their_file(llama_folder):
    """They are mapped, so that reading a large model takes none of the process's own memory."""
    policy = build_policy(str(llama_folder))
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines if str(llama_folder) in line[-1]]
    assert mapped
    for name, parameter in policy.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped), name
