"""Gradient checkpointing of all layers, some, or all but products: exact gradients, and what is computed again."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.modes import disable_dropout
from alignment_modules.policies.scoring import score
from alignment_modules.policies.segments import Segments
from tests.policies.naive import prompts_batch

LAYERS = 3
HOWS = {"false": False, "true": True, "selective": "selective", "every second": 2, "every third": 3}


def make(config, how, **options):
    torch.manual_seed(0)
    config = config | {"num_hidden_layers": LAYERS, "attention_dropout": options.pop("dropout", 0.0)}
    return build_policy(PolicyConfig(config=config, dtype="float64", gradient_checkpointing=how, **options))


def backward(policy):
    """Gradients of a scoring pass, and which operators the backward pass ran."""
    loss = score(policy, Segments.from_prompts(**prompts_batch())).token_logps.square().sum()
    with Operators() as operators:
        loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}, operators.names


class Operators(TorchDispatchMode):
    """Notes the names of the operators that are run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_gradients_are_the_same(tiny_llama_config, assert_same, how, lora):
    expected, _ = backward(make(tiny_llama_config, False, lora=lora))
    found, _ = backward(make(tiny_llama_config, how, lora=lora))
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_dropout_is_drawn_again_or_off(tiny_llama_config, assert_same, how):
    def run(how, off):
        policy = make(tiny_llama_config, how, dropout=0.5)
        if off:
            disable_dropout(policy)
        torch.manual_seed(1)
        return backward(policy)[0]

    for off in (False, True):
        assert_same(run(how, off), run(False, off), 1e-12)


def test_what_is_computed_again(tiny_llama_config):
    """How often each layer's attention and its norms run in the backward pass, and how many products are repeated."""
    counts = {}
    for name, how in HOWS.items():
        policy, again = make(tiny_llama_config, how), []
        for index, layer in enumerate(policy.model.layers):
            layer.self_attn.register_forward_hook(lambda *_, index=index, again=again: again.append(index))
        loss = score(policy, Segments.from_prompts(**prompts_batch())).token_logps.sum()
        again.clear()
        with Operators() as operators:
            loss.backward()
        products = sum(name.startswith(("aten.mm", "aten.addmm")) for name in operators.names)
        attention = sum("scaled_dot_product" in name and "backward" not in name for name in operators.names)
        counts[name] = sorted(again), products, attention
    plain = counts["false"]
    assert plain[0] == []
    assert plain[2] == 0
    assert counts["true"][0] == [0, 1, 2]
    assert counts["true"][2] > 0
    assert counts["true"][1] >= plain[1] + 6 * LAYERS  # the last is not needed: recomputation stops early
    assert counts["selective"][0] == [0, 1, 2]
    assert counts["selective"][1:] == plain[1:]
    assert counts["every second"][0] == [0, 2]
    assert counts["every third"][0] == [0]


@pytest.mark.parametrize("how", ["selective", 2])
def test_sampling_does_without_it_and_puts_it_back(tiny_llama_config, how):
    from alignment_modules.rollouts import SamplingParameters, sample

    policy = make(tiny_llama_config, how)
    flags = [layer.gradient_checkpointing for layer in policy.model.layers]
    ids = torch.arange(1, 7).reshape(2, 3)
    parameters = SamplingParameters(4, greedy=True)
    found = sample(policy, ids, torch.ones_like(ids), parameters=parameters)
    plain = sample(make(tiny_llama_config, False), ids, torch.ones_like(ids), parameters=parameters)
    assert torch.equal(found.ids, plain.ids)
    assert [layer.gradient_checkpointing for layer in policy.model.layers] == flags


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (1, "gradient_checkpointing=1 must be true or false or 'selective' or an integer from 2"),
        (0, "gradient_checkpointing=0 must be"),
        ("some", "gradient_checkpointing='some' must be"),
        (4, "gradient_checkpointing=4: LlamaForCausalLM does not support it .it has 3 layers"),
    ],
)
def test_refuses(tiny_llama_config, how, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_llama_config, how)
