"""A second adapter on the policy's base: the same numbers as a model of its own, and a policy that does not notice."""

import json

import pytest
import torch

from alignment_modules.policies.adapters import adapter_is_identity, merged_state
from alignment_modules.policies.export import export_policy
from alignment_modules.policies.frozen import frozen_companion
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from tests.policies.carrying import logits, train


@pytest.fixture
def saved(llama_folder, tmp_path):
    """`saved(**options)`: the folder of a trained adapter on the tiny Llama."""

    def save(**options):
        torch.manual_seed(7)
        config = PolicyConfig(path=str(llama_folder), lora=LoraConfig(**({"r": 3, "alpha": 6} | options)))
        return str(export_policy(train(build_policy(config)), tmp_path / "saved", lora="adapter"))

    return save


def beside(folder, **options):
    return PolicyConfig(path=folder, merge_adapter=False, **options)


def policy_on(folder, **options):
    torch.manual_seed(1)
    return build_policy(PolicyConfig(path=str(folder), lora=LoraConfig(**({"r": 2} | options))))


@pytest.mark.parametrize("own", [{}, {"target_modules": ["q_proj"]}, {"use_dora": True}, {"init": "pissa"}])
@pytest.mark.parametrize(
    "other", [{}, {"target_modules": ["v_proj", "up_proj"]}, {"use_dora": True}, {"init": "pissa"}]
)
def test_the_same_numbers_as_a_model_of_its_own(llama_folder, saved, own, other):
    folder, policy = saved(**other), policy_on(llama_folder, **own)
    policy.train()
    before, size = logits(train(policy)), sum(p.numel() for p in policy.parameters())
    flags = {id(p): p.requires_grad for p in policy.parameters()}
    policy.train()
    reference = frozen_companion(beside(folder), policy)
    assert policy.training
    with reference.reading() as model:
        found = logits(model)
    alone = build_policy(beside(folder), trainable=False)
    assert torch.equal(found, logits(alone))
    torch.testing.assert_close(found, logits(build_policy(folder)), atol=2e-5, rtol=1e-5)
    assert float((found - before).abs().max()) > 0.01
    assert torch.equal(logits(policy), before)
    now = {id(p): p.requires_grad for p in policy.parameters()}
    assert now == dict.fromkeys(now, False) | flags
    assert sum(p.numel() for p in policy.parameters()) < 1.5 * size
    assert not list(reference.parameters())


def test_the_trained_adapter_alone_is_exported(llama_folder, saved, tmp_path):
    policy = policy_on(llama_folder)
    reference = frozen_companion(beside(saved()), policy)
    assert adapter_is_identity(policy)
    wanted = logits(train(policy))
    assert reference.describe() == "another adapter on the policy's base"
    for lora in ("merge", "adapter"):
        folder = export_policy(policy, tmp_path / lora, lora=lora)
        torch.testing.assert_close(logits(build_policy(str(folder))), wanted, atol=2e-5, rtol=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert not any("reference" in key for key in merged_state(policy)[1])
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir() if path.is_dir()) == []


def test_several_by_name(llama_folder, saved):
    policy, folder = policy_on(llama_folder), saved()
    first = frozen_companion(beside(folder), policy)
    second = frozen_companion(beside(folder), policy, name="teacher.math")
    with first.reading() as model:
        one = logits(model)
    with second.reading() as model:
        assert torch.equal(logits(model), one)
    assert first.fingerprint() != second.fingerprint() != None  # noqa: E711 the names are part of it
    with pytest.raises(ValueError, match="reference: the policy already has an adapter of this name"):
        frozen_companion(beside(folder), policy)


def test_modules_trained_whole_are_the_bases(llama_folder, saved):
    folder, policy = saved(), train(policy_on(llama_folder, modules_to_save=["norm"]))
    reference = frozen_companion(beside(folder), policy)
    with reference.reading() as model:
        found = logits(model)
    assert torch.equal(found, logits(build_policy(beside(folder), trainable=False)))


def test_an_adapter_is_trained_further(llama_folder, saved, tmp_path):
    folder = saved()
    policy = build_policy(beside(folder))
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    assert policy.training
    assert torch.equal(logits(policy), logits(build_policy(beside(folder), trainable=False)))
    wanted = logits(train(policy))
    again = export_policy(policy, tmp_path / "again", lora="adapter")
    assert json.loads((again / "adapter_config.json").read_text())["base_model_name_or_path"] == str(llama_folder)
    torch.testing.assert_close(logits(build_policy(beside(str(again)))), wanted)
    reference = frozen_companion(None, policy)
    assert reference.describe().endswith("a copy since its adapters were trained before")


@pytest.mark.parametrize("checkpointed", [False, True])
def test_recomputed_activations_of_an_adapter_trained_further(saved, checkpointed):
    policy = build_policy(beside(saved(), gradient_checkpointing=checkpointed))
    loss = policy(torch.arange(6)[None]).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


def test_refuses(llama_folder, saved, tiny_llama, tmp_path):
    folder, policy = saved(), policy_on(llama_folder)

    def refused(says, config, model=policy, **options):
        with pytest.raises(ValueError, match=says):
            frozen_companion(config, model, **options)

    refused(r"reference.merge_adapter=False shares the base .* LlamaForCausalLM trains all", beside(folder), tiny_llama)
    refused(r"reference.dtype='bfloat16' has no effect", beside(folder, dtype="bfloat16"))
    refused(r"merge_adapter=False has no effect: .*llama' holds no adapter", beside(str(llama_folder)))
    refused(r"reference.path=.*missing", beside("/no/such"))
    refused(r"teacher.merge_adapter=False shares", beside(folder), saved=True, name="teacher")
    torch.manual_seed(0)
    fresh = build_policy(PolicyConfig(config=tiny_llama.config.to_diff_dict(), lora=LoraConfig()))
    refused("the policy's base is on no disk", beside(folder), fresh)
    policy.base_model.model.model.norm.weight.requires_grad_(True)
    refused(r"of which .*norm.weight' is trained", beside(folder))
    policy.base_model.model.model.norm.weight.requires_grad_(False)
    file = tmp_path / "saved" / "adapter_config.json"
    good = json.loads(file.read_text())
    for changes, says in (
        ({"base_model_name_or_path": "/other"}, "is of the base '/other', and the policy's is"),
        ({"modules_to_save": ["norm"]}, r"not of LoRA alone \(modules_to_save\)"),
        ({"bias": "all"}, r"not of LoRA alone \(bias='all'\)"),
        ({"r": 5}, "does not fit the policy's base"),
    ):
        file.write_text(json.dumps(good | changes))
        refused(says, beside(folder))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora": LoraConfig()}, "policy.merge_adapter=False contradicts policy.lora"),
        ({"added_tokens": ["<x>"]}, "policy.merge_adapter=False contradicts policy.added_tokens"),
    ],
)
def test_contradictions(saved, options, says):
    with pytest.raises(ValueError, match=says):
        build_policy(beside(saved(), **options))


def test_a_fresh_model_or_a_whole_one_has_no_adapter_to_keep(llama_folder, tiny_llama_config):
    with pytest.raises(ValueError, match=r"policy.merge_adapter=False contradicts policy.config"):
        build_policy(PolicyConfig(config=tiny_llama_config, merge_adapter=False))
    with pytest.raises(ValueError, match=r"policy.merge_adapter=False has no effect"):
        build_policy(beside(str(llama_folder)))
