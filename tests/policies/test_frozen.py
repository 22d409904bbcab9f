import copy
import pickle

import pytest
import torch
from torch import nn

from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.policies.frozen import Frozen, companions, frozen_companion, row_keys
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy

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
    reference = frozen_companion(None, tiny_llama)
    assert is_frozen(reference)
    assert all(p.grad is None for p in reference.parameters())
    assert not storages(reference) & storages(tiny_llama)
    assert reference.module.lm_head.weight is reference.module.get_input_embeddings().weight
    assert tiny_llama.training
    assert all(p.requires_grad and p.grad is not None for p in tiny_llama.parameters())
    before = reference.fingerprint()
    assert before == fingerprint(tiny_llama)
    torch.optim.SGD(tiny_llama.parameters(), lr=0.1).step()
    assert reference.fingerprint() == before != fingerprint(tiny_llama)


def test_a_plain_module_is_copied_too():
    policy = nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5))
    reference = frozen_companion(None, policy)
    assert is_frozen(reference)
    assert reference.fingerprint() == fingerprint(policy)
    assert not storages(reference) & storages(policy)


def test_fresh_adapters_need_no_second_model(tiny_llama_config):
    companion = frozen_companion(None, lora_policy(tiny_llama_config))
    assert companion.module is None
    assert companion.fingerprint() is None
    assert companion.describe() == "the policy, adapter off"
    assert not list(companion.parameters())


def test_a_trained_adapter_is_copied_because_its_base_is_another_model(tiny_llama_config):
    policy = lora_policy(tiny_llama_config)
    nn.init.normal_(policy.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight)
    reference = frozen_companion(None, policy)
    assert is_frozen(reference)
    assert torch.equal(logits(reference.module), logits(policy.eval()))
    assert not storages(reference) & storages(policy)


@pytest.mark.parametrize("kind", [str, lambda path: PolicyConfig(path=str(path))])
def test_a_folder_is_loaded_and_frozen(llama_folder, tiny_llama, tiny_llama_config, kind):
    policy = build_policy(PolicyConfig(config=tiny_llama_config))
    reference = frozen_companion(kind(llama_folder), policy)
    assert is_frozen(reference)
    assert reference.fingerprint() == fingerprint(tiny_llama)


def test_a_folder_is_loaded_in_the_policys_dtype(llama_folder, tiny_llama_config):
    policy = build_policy(PolicyConfig(config=tiny_llama_config, dtype="bfloat16"))
    assert frozen_companion(str(llama_folder), policy).module.dtype == torch.bfloat16
    assert frozen_companion(PolicyConfig(path=str(llama_folder)), policy).module.dtype == torch.float32


def test_a_module_is_frozen_in_place(tiny_llama):
    mine = copy.deepcopy(tiny_llama).train()
    assert frozen_companion(mine, tiny_llama).module is mine
    assert is_frozen(mine)


def test_what_is_refused(tiny_llama, tiny_llama_config, llama_folder):
    with pytest.raises(ValueError, match=r"reference shares .* with the policy"):
        frozen_companion(tiny_llama, tiny_llama)
    with pytest.raises(ValueError, match=r"reference shares 'embed_tokens.weight'"):
        frozen_companion(tiny_llama.model, tiny_llama)
    assert all(p.requires_grad for p in tiny_llama.parameters())
    with pytest.raises(ValueError, match=r"reference\.lora"):
        frozen_companion(PolicyConfig(path=str(llama_folder), lora=LoraConfig()), tiny_llama)
    with pytest.raises(ValueError, match="missing"):
        frozen_companion("/no/such/folder", tiny_llama)
    with pytest.raises(ValueError, match=r"teacher shares .* leave teacher out"):
        frozen_companion(tiny_llama, tiny_llama, name="teacher")
    with pytest.raises(ValueError, match=r"teacher\.lora"):
        frozen_companion(PolicyConfig(path=str(llama_folder), lora=LoraConfig()), tiny_llama, name="teacher")
    with pytest.raises(ValueError, match="module=None stands for the policy with its adapters off, but Llama"):
        Frozen(None, of=tiny_llama)


def test_reading_a_second_model(tiny_llama):
    reference = frozen_companion(None, tiny_llama.train())
    reference.module.model.layers[0].train()  # somebody's odd flags
    modes = [m.training for m in reference.modules()]
    with reference.reading() as module:
        assert module is reference.module
        assert not any(m.training for m in module.modules())
        assert not module(TOKENS).logits.requires_grad
        assert tiny_llama.training
    assert [m.training for m in reference.modules()] == modes
    assert torch.is_grad_enabled()


def test_reading_with_adapters_off(tiny_llama_config):
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
            with Frozen(None, of=policy).reading() as module:
                assert module is policy
                assert torch.equal(module(TOKENS).logits, at_start)
                if failing:
                    raise RuntimeError
        except RuntimeError:
            assert failing
        assert [m.training for m in policy.modules()] == modes
        assert [p.requires_grad for p in policy.parameters()] == flags
    assert not torch.equal(logits(policy.eval()), at_start)


class Holder(nn.Module):
    """A policy with two companions, one of them saved, and one deeper within."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.policy = nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5))
        self.anchor = frozen_companion(None, self.policy, name="anchor")
        self.average = frozen_companion(None, self.policy, saved=True)
        self.teachers = nn.ModuleDict({"small": Frozen(nn.Linear(2, 2), of=self.policy)})


def test_companions_look_after_themselves():
    holder = Holder()
    assert list(companions(holder)) == ["anchor", "average", "teachers.small"]
    holder.train()
    assert holder.policy[1].training
    assert all(is_frozen(companion) for companion in companions(holder).values())
    trained = [name for name, p in holder.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.startswith("policy.") for name in trained)
    assert not any(child is holder.policy for child in holder.anchor.modules())


def test_only_a_saved_companion_is_in_the_state_and_the_rest_is_strict():
    holder, other = Holder(), Holder(seed=1)
    state = holder.state_dict()
    assert {key.split(".")[0] for key in state} == {"policy", "average"}
    assert not holder.anchor.state_dict()
    before = other.anchor.fingerprint()
    other.load_state_dict(state)
    assert other.anchor.fingerprint() == before
    assert other.average.fingerprint() == fingerprint(holder.average.module) == fingerprint(other.policy)
    for key in ("policy.2.bias", "average.module.2.bias"):
        with pytest.raises(RuntimeError, match=f"Missing.*{key}"):
            other.load_state_dict({name: value for name, value in state.items() if name != key})
    for key in ("anchor.module.9.bias", "anchor.bias", "more.bias"):
        with pytest.raises(RuntimeError, match=f"Unexpected.*{key}"):
            other.load_state_dict({**state, key: torch.ones(1)})


def test_a_fingerprint_is_kept_until_the_weights_change(monkeypatch):
    holder, counted = Holder(), []
    monkeypatch.setattr(
        "alignment_modules.policies.frozen.fingerprint", lambda module: counted.append(1) or fingerprint(module)
    )
    first = holder.anchor.fingerprint()
    assert holder.anchor.fingerprint() == first
    assert len(counted) == 1
    with torch.no_grad():
        holder.anchor.module[2].bias[0] += 1e-3
    assert holder.anchor.fingerprint() == fingerprint(holder.anchor.module) != first


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda holder: pickle.loads(pickle.dumps(holder))])
def test_copies_stay_together(copied):
    holder = Holder()
    twin = copied(holder)
    assert twin.anchor.of is twin.policy is not holder.policy
    assert not storages(twin) & storages(holder)
    assert twin.state_dict().keys() == holder.state_dict().keys()
    with torch.no_grad():
        twin.policy[2].weight.add_(1.0)
    twin.average.refresh()
    assert torch.equal(twin.average.module[2].weight, twin.policy[2].weight)
    twin.load_state_dict(holder.state_dict())
    assert fingerprint(twin.policy) == fingerprint(holder.policy)


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_refresh_moves_towards_the_policy(alpha):
    holder = Holder()
    companion, old = holder.average, copy.deepcopy(holder.average.module)
    companion.cached([b"a"], lambda: torch.zeros(1))
    first = companion.fingerprint()
    with torch.no_grad():
        for parameter in holder.policy.parameters():
            parameter.add_(torch.randn_like(parameter))
        holder.policy[1].running_mean.add_(1.0)
    companion.refresh(alpha)
    for mine, new, before in zip(
        companion.module.parameters(), holder.policy.parameters(), old.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, alpha * new + (1 - alpha) * before)
    assert torch.equal(companion.module[1].running_mean, holder.policy[1].running_mean)
    assert is_frozen(companion)
    assert companion.fingerprint() != first
    assert companion.cached([b"a"], lambda: torch.ones(1)).item() == 1


def test_what_cannot_be_refreshed(tiny_llama_config):
    policy = lora_policy(tiny_llama_config)
    with pytest.raises(ValueError, match="adapters off; build it with saved=True"):
        frozen_companion(None, policy).refresh()
    saved = frozen_companion(None, policy, saved=True)
    nn.init.normal_(policy.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight)
    saved.refresh()
    torch.testing.assert_close(logits(saved.module), logits(policy.eval()), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="in no checkpoint"):
        Holder().anchor.refresh()
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        saved.refresh(1.5)
    with pytest.raises(ValueError, match="Linear and the policy Sequential differ in 7 parameters"):
        Frozen(nn.Linear(2, 2), of=Holder().policy, saved=True).refresh()


def test_rows_are_scored_once_by_what_they_hold():
    holder, calls = Holder(), []

    def ask(keys, value):
        return holder.anchor.cached(keys, lambda: calls.append(1) or torch.full((len(keys), 2), value))

    assert torch.equal(ask([b"a", b"b"], 1.0), ask([b"b", b"a"], 9.0))
    assert float(ask([b"a", b"c"], 2.0).mean()) == 2.0
    assert len(calls) == 2
    assert float(ask([b"c"], 9.0).mean()) == 2.0
    holder.anchor.module[2].weight.data[0, 0] += 1.0
    assert float(ask([b"c"], 3.0).mean()) == 3.0


def test_row_keys_know_values_and_not_their_padding():
    values = torch.tensor([[0, 1, 2], [1, 2, 0], [1, 2, 3], [1, 2, 9]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]])
    first, second, third, fourth = row_keys((values, mask))
    assert first == second == fourth != third
    assert row_keys((values, mask), (mask, mask))[0] != first
    assert row_keys((values[:0], mask[:0])) == []


def test_a_reward_model_is_no_reference(tiny_llama):
    model = PolicyConfig(config={**tiny_llama.config.to_dict(), "model_type": "llama"}, head="scalar")
    with pytest.raises(ValueError, match="reference"):
        frozen_companion(model, tiny_llama)
    frozen = frozen_companion(model, tiny_llama, name="reward_model", head="scalar")
    assert frozen.module.score.out_features == 1
