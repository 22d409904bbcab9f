"""Offload of activations: the same gradients, what is copied, and where it is refused."""

import copy

import lightning as L
import pytest
import torch
from torch import nn

from alignment_modules import DPOModule, PPOModule, SFTModule
from alignment_modules.policies.critic import build_critic
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.offloading import check_offloading, is_offloaded, offload_activations
from alignment_modules.policies.scoring import score
from alignment_modules.policies.segments import Segments
from tests.batches import supervised, threes
from tests.policies.naive import prompts_batch


def make(config, **options):
    torch.manual_seed(0)
    config = config | {"attention_dropout": options.pop("dropout", 0.0)}
    return build_policy(PolicyConfig(config=config, dtype="float64", **options))


def logps(policy):
    torch.manual_seed(1)
    return score(policy, Segments.from_prompts(**prompts_batch())).token_logps


def gradients(policy):
    logps(policy).square().sum().backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.fixture
def kept(monkeypatch):
    """What the hooks put away and take back, and where it was."""
    put, taken, sources = [], [], set()
    real = torch.autograd.graph.saved_tensors_hooks

    def watched(pack, unpack):
        def packing(tensor):
            packed = pack(tensor)
            if not isinstance(packed, torch.Tensor):
                put.append(packed[1])
                sources.add(tensor.untyped_storage().data_ptr())
            return packed

        def unpacking(packed):
            if not isinstance(packed, torch.Tensor):
                taken.append(packed[1])
            return unpack(packed)

        return real(packing, unpacking)

    monkeypatch.setattr("alignment_modules.policies.offloading.torch.autograd.graph.saved_tensors_hooks", watched)
    return put, taken, sources


@pytest.mark.parametrize("how", [False, True, "selective", 2])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"lora": LoraConfig(r=2)}], ids=["full", "dropout", "lora"])
def test_gradients_are_the_same(tiny_llama_config, assert_same, how, options):
    expected = gradients(make(tiny_llama_config, gradient_checkpointing=how, **options))
    found = gradients(make(tiny_llama_config, gradient_checkpointing=how, activation_offloading=True, **options))
    assert_same(found, expected, 1e-12)


def test_what_is_put_away(tiny_llama_config, kept):
    put, taken, sources = kept
    policy = make(tiny_llama_config, activation_offloading=True)
    loss = logps(policy).sum()
    count = len(put)
    assert count > 20
    assert all(one.nbytes >= 1024 for one in put)
    assert not sources & {p.untyped_storage().data_ptr() for p in policy.parameters()}
    loss.backward()
    assert len(put) == count
    assert len(taken) >= count


def test_with_checkpointing_the_inputs_of_the_layers_are_put_away(tiny_llama_config, kept):
    put = kept[0]
    policy, inputs = make(tiny_llama_config, activation_offloading=True, gradient_checkpointing=True), []
    for layer in policy.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    loss = logps(policy).sum()
    assert len(inputs) == 2
    for one in inputs:
        assert any(one.shape == other.shape and torch.equal(one, other) for other in put)
    few, _ = len(put), put.clear()
    logps(make(tiny_llama_config, activation_offloading=True)).sum()
    assert few < len(put) / 2
    loss.backward()


def test_nothing_is_put_away_without_gradients_or_without_the_option(tiny_llama_config, kept):
    logps(make(tiny_llama_config)).sum().backward()
    with torch.no_grad():
        logps(make(tiny_llama_config, activation_offloading=True))
    assert kept == ([], [], set())


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)])
def test_a_critic_that_is_a_copy_is_offloaded_too(tiny_llama_config, lora):
    for given in (False, True):
        policy = make(tiny_llama_config, lora=lora, activation_offloading=given)
        assert is_offloaded(build_critic(None, policy)) is given


class TestRefusals:
    @pytest.fixture
    def policy(self, tiny_llama):
        policy = copy.deepcopy(tiny_llama)
        offload_activations(policy)
        return policy

    def test_on_a_cpu(self, train, policy):
        with pytest.raises(ValueError, match=r"policy.activation_offloading=True has no effect on 'cpu'"):
            train(SFTModule(policy=policy), [supervised(range(2))])

    def test_of_a_critic(self, train, tiny_llama, policy):
        module = PPOModule(policy=tiny_llama, rewards=threes, critic=build_critic(None, policy))
        with pytest.raises(ValueError, match=r"critic.activation_offloading=True has no effect on 'cpu'"):
            train(module, [supervised(range(2))])

    def test_validation_needs_no_gradients(self, policy):
        loader = torch.utils.data.DataLoader([supervised(range(2))], batch_size=None)
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        assert trainer.validate(SFTModule(policy=policy), loader, verbose=False)[0]["val/loss"] > 0

    def test_in_shards(self, policy):
        module = nn.ModuleDict({"policy": policy})
        check_offloading(module, torch.device("cuda"), sharded=False)
        with pytest.raises(ValueError, match=r"policy.activation_offloading=True is not for sharded weights.*ddp"):
            check_offloading(module, torch.device("cuda"), sharded=True)

    def test_of_a_model_that_is_not_trained(self, tiny_llama, tiny_llama_config):
        reference = PolicyConfig(config=tiny_llama_config, activation_offloading=True)
        with pytest.raises(
            ValueError, match=r"reference.activation_offloading=True has no effect: this model is never"
        ):
            DPOModule(policy=tiny_llama, reference=reference)
