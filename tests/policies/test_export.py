import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment_modules.policies.export import export_policy
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.tokenizers import load_tokenizer

TOKENS = torch.arange(1, 13).reshape(2, 6)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def lora_policy(source, **options):
    torch.manual_seed(0)
    policy = build_policy(PolicyConfig(**source, lora=LoraConfig(r=2, **options)))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter += torch.randn_like(parameter)
    return policy


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_full_model_comes_back_bit_for_bit(tiny_llama_config, tokenizer, tmp_path, dtype, tied):
    config = {**tiny_llama_config, "tie_word_embeddings": tied}
    policy = build_policy(PolicyConfig(config=config, dtype=dtype))
    before = fingerprint(policy)
    folder = export_policy(policy, tmp_path / "deep" / "export", tokenizer)
    assert folder == tmp_path / "deep" / "export"
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= set(os.listdir(folder))
    assert os.listdir(tmp_path / "deep") == ["export"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == getattr(torch, dtype)
    assert fingerprint(model) == before == fingerprint(policy)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert policy.training
    assert fingerprint(build_policy(PolicyConfig(path=str(folder), dtype="auto"))) == before


def test_the_tokenizer_keeps_its_template_and_ids(tiny_llama, tokenizer, tmp_path):
    export_policy(tiny_llama, tmp_path / "export", tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("w3 w4 <turn> <end>").input_ids == [3, 4, 32, 30]
    assert load_tokenizer(str(tmp_path / "export")).pad_token_id == 31


def test_generation_stops_where_the_tokenizer_ends(tiny_llama, tokenizer, tmp_path):
    assert tiny_llama.generation_config.eos_token_id == 2  # the class default, here the ordinary token w2
    export_policy(tiny_llama, tmp_path / "export", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 30
    assert model.generation_config.pad_token_id == 31
    assert model.generation_config.bos_token_id is None
    assert model.config.pad_token_id is None  # would stop that embedding from learning
    assert tiny_llama.generation_config.eos_token_id == 2


@pytest.mark.parametrize(("given", "kept"), [([32, 30], [32, 30]), (32, [30, 32]), ([5, 31, 30], 30), (None, 30)])
def test_further_end_ids_stay_where_the_tokenizer_knows_them(tiny_llama, tokenizer, tmp_path, given, kept):
    tiny_llama.generation_config.eos_token_id = given
    export_policy(tiny_llama, tmp_path / "export", tokenizer)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.eos_token_id == kept


def test_merged_lora_is_the_policy_and_leaves_it_alone(tiny_llama_config, tokenizer, tmp_path):
    policy = lora_policy({"config": tiny_llama_config, "dtype": "float64"})
    policy.train()
    modes, before = [m.training for m in policy.modules()], fingerprint(policy)
    flags = [p.requires_grad for p in policy.parameters()]
    export_policy(policy, tmp_path / "export", tokenizer)
    assert [m.training for m in policy.modules()] == modes
    assert [p.requires_grad for p in policy.parameters()] == flags
    assert fingerprint(policy) == before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.dtype == torch.float64
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), logits(policy))
    assert not any("lora" in key for key in load_file(tmp_path / "export" / "model.safetensors"))


def test_a_merged_embedding_is_untied_in_the_export(tiny_llama, tmp_path):
    import peft

    tiny_llama.double()
    options = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["embed_tokens"], "init_lora_weights": False}
    policy = peft.get_peft_model(tiny_llama, peft.LoraConfig(**options))
    export_policy(policy, tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model), logits(policy))
    assert tiny_llama.config.tie_word_embeddings


def test_an_adapter_alone(llama_folder, tokenizer, tmp_path, monkeypatch):
    import peft

    monkeypatch.chdir(llama_folder.parent)
    policy = lora_policy({"path": "./llama"})
    folder = export_policy(policy, tmp_path / "adapter", tokenizer, lora="adapter")
    assert "adapter_model.safetensors" in os.listdir(folder)
    assert "model.safetensors" not in os.listdir(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(llama_folder)
    monkeypatch.chdir("/")
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder), folder)
    assert torch.equal(logits(stock), logits(policy))
    torch.testing.assert_close(logits(build_policy(str(folder))), logits(policy), rtol=1e-5, atol=1e-4)
    assert len(load_tokenizer(str(folder))) == len(tokenizer)


def test_the_active_adapter_alone_whatever_its_name(llama_folder, tmp_path):
    import peft

    options = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    policy = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), options, adapter_name="mine")
    policy.add_adapter("other", options)
    folder = export_policy(policy, tmp_path / "adapter", lora="adapter")
    assert not [file for file in folder.iterdir() if file.is_dir()]
    torch.testing.assert_close(logits(build_policy(str(folder))), logits(policy), rtol=1e-5, atol=1e-4)


def test_an_adapter_without_tokenizer_has_its_bases(llama_folder, tokenizer, tmp_path):
    folder = export_policy(lora_policy({"path": str(llama_folder)}), tmp_path / "adapter", lora="adapter")
    assert load_tokenizer(str(folder)).get_vocab() == tokenizer.get_vocab()


def test_an_adapter_whose_base_is_nowhere_on_disk(tiny_llama, tiny_llama_config, llama_folder, tmp_path):
    with pytest.raises(ValueError, match=r"base model .* is not on disk"):
        export_policy(lora_policy({"config": tiny_llama_config}), tmp_path / "x", lora="adapter")
    first = export_policy(lora_policy({"path": str(llama_folder)}), tmp_path / "adapter", lora="adapter")
    second = lora_policy({"path": str(first)})
    with pytest.raises(ValueError, match=r"base model .* is not on disk"):
        export_policy(second, tmp_path / "x", lora="adapter")
    merged = AutoModelForCausalLM.from_pretrained(export_policy(second, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(second), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="has no adapters"):
        export_policy(tiny_llama, tmp_path / "x", lora="adapter")
    assert not (tmp_path / "x").exists()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_a_plain_module_with_tied_weights(tmp_path, tokenizer):
    policy = Plain()
    folder = export_policy(policy, tmp_path / "export", tokenizer)
    other = Plain()
    load_model(other, folder / "model.safetensors")
    assert fingerprint(other) == fingerprint(policy)
    assert other.head.weight is other.embedding.weight
    assert json.loads((folder / "alignment_modules.json").read_text())["class"].endswith("Plain")
    with pytest.raises(ValueError, match="the export of a plain module"):
        build_policy(str(folder))


def test_an_export_is_replaced_only_by_a_complete_one(tiny_llama, tokenizer, tmp_path, monkeypatch):
    folder = export_policy(tiny_llama, tmp_path / "export", tokenizer)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    nn.init.zeros_(tiny_llama.model.norm.weight)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "save_pretrained", full, raising=False)
        with pytest.raises(OSError, match="No space left"):
            export_policy(tiny_llama, folder, tokenizer)
    rename = Path.rename

    def fails_for_new(self, target):
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails_for_new)
        with pytest.raises(OSError, match="Input/output"):
            export_policy(tiny_llama, folder, tokenizer)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["export"]

    export_policy(tiny_llama, folder)
    assert not AutoModelForCausalLM.from_pretrained(folder).model.norm.weight.any()
    assert not (folder / "tokenizer.json").exists()  # the new export has none
    assert os.listdir(tmp_path) == ["export"]


def test_files_that_somebody_added_are_carried_over(tiny_llama, tmp_path):
    folder = export_policy(tiny_llama, tmp_path / "export")
    (folder / "results").mkdir()
    (folder / "results" / "scores.txt").write_text("mine")
    export_policy(tiny_llama, folder)
    export_policy(tiny_llama, folder)
    assert (folder / "results" / "scores.txt").read_text() == "mine"


def test_a_folder_that_is_not_an_export_is_never_replaced(tiny_llama, llama_folder, tmp_path):
    files = sorted(os.listdir(llama_folder))
    with pytest.raises(ValueError, match="not an export"):
        export_policy(tiny_llama, llama_folder)
    assert sorted(os.listdir(llama_folder)) == files
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        export_policy(tiny_llama, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export_policy(tiny_llama, tmp_path / "empty")


def test_a_link_stays_a_link(tiny_llama, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export_policy(tiny_llama, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()


def test_what_is_refused(tiny_llama, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="lora='merged': allowed are 'merge'"):
        export_policy(tiny_llama, tmp_path / "x", lora="merged")
    with pytest.raises(ValueError, match="tokenizer of type str"):
        export_policy(tiny_llama, tmp_path / "x", "folder")
    assert not (tmp_path / "x").exists()


def test_a_compiled_wrapper_is_looked_through(tiny_llama, tmp_path):
    folder = export_policy(torch.compile(tiny_llama), tmp_path / "export")
    assert fingerprint(AutoModelForCausalLM.from_pretrained(folder)) == fingerprint(tiny_llama)
