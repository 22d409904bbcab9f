import copy

import pytest
import torch
from torch import nn

from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.reference import build_reference, disable_dropout, fingerprint, reference_mode

TOKENS = torch.arange(1, 13).reshape(2, 6)


def lora_policy(config, **options):
    torch.manual_seed(0)
    return build_policy(PolicyConfig(config=config, lora=LoraConfig(r=2), **options))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def storages(module):
    return {t.data_ptr() for t in [*module.parameters(), *module.buffers()] if t.numel()}


def is_frozen(module):
    return not any(m.training for m in module.modules()) and not any(p.requires_grad for p in module.parameters())


def test_no_reference_is_a_frozen_copy_that_shares_nothing(tiny_llama):
    tiny_llama.train()
    tiny_llama(TOKENS).logits.sum().backward()
    reference = build_reference(None, tiny_llama)
    assert is_frozen(reference)
    assert all(p.grad is None for p in reference.parameters())
    assert not storages(reference) & storages(tiny_llama)
    assert reference.lm_head.weight is reference.get_input_embeddings().weight
    assert tiny_llama.training
    assert all(p.requires_grad and p.grad is not None for p in tiny_llama.parameters())
    before = fingerprint(reference)
    assert before == fingerprint(tiny_llama)
    torch.optim.SGD(tiny_llama.parameters(), lr=0.1).step()
    assert fingerprint(reference) == before != fingerprint(tiny_llama)


def test_a_plain_module_is_copied_too():
    policy = nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5))
    reference = build_reference(None, policy)
    assert is_frozen(reference)
    assert fingerprint(reference) == fingerprint(policy)
    assert not storages(reference) & storages(policy)


def test_fresh_adapters_need_no_second_model(tiny_llama_config):
    assert build_reference(None, lora_policy(tiny_llama_config)) is None


def test_a_trained_adapter_is_copied_because_its_base_is_another_model(tiny_llama_config):
    policy = lora_policy(tiny_llama_config)
    nn.init.normal_(policy.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight)
    reference = build_reference(None, policy)
    assert is_frozen(reference)
    assert torch.equal(logits(reference), logits(policy.eval()))
    assert not storages(reference) & storages(policy)


@pytest.mark.parametrize("kind", [str, lambda path: PolicyConfig(path=str(path))])
def test_a_folder_is_loaded_and_frozen(llama_folder, tiny_llama, tiny_llama_config, kind):
    policy = build_policy(PolicyConfig(config=tiny_llama_config))
    reference = build_reference(kind(llama_folder), policy)
    assert is_frozen(reference)
    assert fingerprint(reference) == fingerprint(tiny_llama)


def test_a_folder_is_loaded_in_the_policys_dtype(llama_folder, tiny_llama_config):
    policy = build_policy(PolicyConfig(config=tiny_llama_config, dtype="bfloat16"))
    assert build_reference(str(llama_folder), policy).dtype == torch.bfloat16
    assert build_reference(PolicyConfig(path=str(llama_folder)), policy).dtype == torch.float32


def test_a_module_is_frozen_in_place(tiny_llama):
    mine = copy.deepcopy(tiny_llama).train()
    assert build_reference(mine, tiny_llama) is mine
    assert is_frozen(mine)


def test_what_is_refused(tiny_llama, tiny_llama_config, llama_folder):
    with pytest.raises(ValueError, match=r"reference shares .* with the policy"):
        build_reference(tiny_llama, tiny_llama)
    with pytest.raises(ValueError, match=r"reference shares 'embed_tokens.weight'"):
        build_reference(tiny_llama.model, tiny_llama)
    assert all(p.requires_grad for p in tiny_llama.parameters())
    with pytest.raises(ValueError, match=r"reference\.lora"):
        build_reference(PolicyConfig(path=str(llama_folder), lora=LoraConfig()), tiny_llama)
    with pytest.raises(ValueError, match="missing"):
        build_reference("/no/such/folder", tiny_llama)
    with pytest.raises(ValueError, match="reference=None"), reference_mode(tiny_llama, None):
        pass


def test_reference_mode_with_a_second_model(tiny_llama):
    reference = build_reference(None, tiny_llama.train())
    reference.model.layers[0].train()  # somebody's odd flags
    modes = [m.training for m in reference.modules()]
    with reference_mode(tiny_llama, reference) as module:
        assert module is reference
        assert not any(m.training for m in module.modules())
        assert not module(TOKENS).logits.requires_grad
        assert tiny_llama.training
    assert [m.training for m in reference.modules()] == modes
    assert torch.is_grad_enabled()


def test_reference_mode_with_adapters_off(tiny_llama_config):
    policy = lora_policy(tiny_llama_config)
    at_start = logits(policy.eval())
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    policy.train()
    policy.base_model.model.model.layers[1].eval()
    modes = [m.training for m in policy.modules()]
    flags = [p.requires_grad for p in policy.parameters()]
    for failing in (False, True):
        try:
            with reference_mode(policy, None) as module:
                assert module is policy
                assert torch.equal(module(TOKENS).logits, at_start)
                if failing:
                    raise RuntimeError
        except RuntimeError:
            assert failing
        assert [m.training for m in policy.modules()] == modes
        assert [p.requires_grad for p in policy.parameters()] == flags
    assert not torch.equal(logits(policy.eval()), at_start)


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
    assert is_frozen(build_reference(None, model))


def test_disable_dropout_of_a_plain_module():
    policy = nn.Sequential(nn.Embedding(40, 8), nn.Dropout(0.5), nn.Linear(8, 40))
    disable_dropout(policy)
    assert not policy.training
    assert torch.equal(policy(TOKENS), policy(TOKENS))


class Reordered(nn.Module):
    def __init__(self, names, values):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(values[name]))


def test_fingerprint():
    values = {"a": torch.randn(2, 3), "b": torch.randn(3, dtype=torch.bfloat16), "c": torch.tensor(1.5)}
    first = fingerprint(Reordered("abc", values))
    assert len(first) == 64
    assert fingerprint(Reordered("cba", values)) == first
    strided = {**values, "a": values["a"].T.contiguous().T}
    assert not strided["a"].is_contiguous()
    assert fingerprint(Reordered("abc", strided)) == first
    for change in (
        {"a": torch.nextafter(values["a"], torch.tensor(9.0))},
        {"a": values["a"].reshape(3, 2)},
        {"a": values["a"].double()},
        {"b": torch.zeros(3, dtype=torch.bfloat16)},
        {"c": torch.tensor([1.5])},
    ):
        assert fingerprint(Reordered("abc", {**values, **change})) != first
    swapped = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert fingerprint(Reordered("ab", swapped)) != fingerprint(Reordered("ab", {"a": swapped["b"], "b": swapped["a"]}))
    empty = Reordered("a", {"a": torch.empty(0, 3)})
    assert fingerprint(empty) != fingerprint(nn.Module())


def test_fingerprint_sees_buffers_and_any_one_bit():
    norm = nn.BatchNorm1d(4)
    before = fingerprint(norm)
    norm.running_mean.view(torch.int32)[2] ^= 1
    assert fingerprint(norm) != before
    norm.running_mean.view(torch.int32)[2] ^= 1
    assert fingerprint(norm) == before
