import peft
import pytest
import torch

from alignment_modules.policies.adapters import adapter_is_identity, has_adapter
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from tests.policies.carrying import logits, train


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
