"""Compiled layers: the numbers of eager ones, few graphs whatever the lengths, and none where something is sampled.

Most tests run the traced and differentiated graphs without a C++ compiler; those marked slow compile them.
"""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from alignment_modules.policies.compiling import is_compiled, without_graphs
from alignment_modules.policies.critic import build_critic
from alignment_modules.policies.export import export_policy
from alignment_modules.policies.frozen import frozen_companion
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.modes import disable_dropout, reading_mode
from alignment_modules.policies.scoring import score
from alignment_modules.policies.segments import Segments
from alignment_modules.rollouts import SamplingParameters, sample
from tests.models import MIXTRAL
from tests.shapes import SIZES

GPT2 = {
    "model_type": "gpt2",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 40,
}
GEMMA2 = {
    "model_type": "gemma2",
    **SIZES,
    "head_dim": 8,
    "sliding_window": 4,
}


@pytest.fixture
def graphs():
    """Counts graphs, which are run as torch would differentiate them, but not compiled any further."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.compiler.set_stance("default", force_backend=counter):
        yield counter
    torch.compiler.reset()


def make(config, **options):
    torch.manual_seed(0)
    return build_policy(PolicyConfig(config=config, **options))


def segments(seed):
    """Prompts with two completions each, of other lengths for every seed."""
    generator = torch.Generator().manual_seed(seed)
    widths = (3 + seed, 4 + 2 * seed)
    rows = 2 + seed % 3
    ids = [
        torch.randint(1, 40, (count, width), generator=generator)
        for count, width in zip((rows, 2 * rows), widths, strict=True)
    ]
    masks = [
        torch.arange(part.shape[1])[None] < torch.randint(1, part.shape[1] + 1, (len(part), 1), generator=generator)
        for part in ids
    ]
    return Segments.from_prompts(ids[0], masks[0], ids[1], masks[1])


def gradients(policy, seed):
    policy.zero_grad()
    scores = score(policy, segments(seed))
    logps = scores.token_logps
    (-logps.sum() / scores.mask.sum()).backward()
    return logps.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def both(config, dropout=0.0, **options):
    """A compiled policy and the same without."""
    if config["model_type"] == "llama":
        config = config | {"num_hidden_layers": 3, "attention_dropout": dropout}
    return [make(config, compile=compiled, **options) for compiled in (True, False)]


def check(policy, plain, graphs, assert_same, seeds=range(3)):
    """The numbers agree, and after the first lengths there is nothing more to compile."""
    counted = []
    for seed in seeds:
        (logps, found), (expected_logps, expected) = (gradients(model, seed) for model in (policy, plain))
        torch.testing.assert_close(logps, expected_logps, rtol=1e-5, atol=1e-5)
        assert_same(found, expected)
        with reading_mode(policy), reading_mode(plain):
            read, expected_read = (score(model, segments(seed)).token_logps for model in (policy, plain))
        torch.testing.assert_close(read, expected_read, rtol=1e-5, atol=1e-5)
        counted.append(graphs.frame_count)
    assert counted[0] > 0
    assert counted == [counted[0]] * len(counted)


def test_numbers_are_those_of_the_eager_policy_with_one_set_of_graphs_for_all_lengths(
    tiny_llama_config, assert_same, graphs
):
    policy, plain = both(tiny_llama_config)
    assert policy.state_dict().keys() == plain.state_dict().keys()
    assert graphs.frame_count == 0  # what a policy can do is found out without
    check(policy, plain, graphs, assert_same)


OTHERS = {
    "checkpointing": {"gradient_checkpointing": True},
    "every second": {"gradient_checkpointing": 2},
    "lora": {"lora": LoraConfig(r=2)},
    "lora checkpointing": {"lora": LoraConfig(r=2), "gradient_checkpointing": True},
    "dropout off": {"gradient_checkpointing": True, "dropout": 0.5},
    "eager attention": {"attn_implementation": "eager"},
    "gpt2": {"config": GPT2},
    "gemma2": {"config": GEMMA2},
    "mixtral": {"config": MIXTRAL},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_so_are_those_of_other_policies(tiny_llama_config, assert_same, graphs, name):
    policy, plain = both(**{"config": tiny_llama_config} | OTHERS[name])
    if name == "dropout off":
        disable_dropout(policy)
        disable_dropout(plain)
    check(policy, plain, graphs, assert_same)


@pytest.mark.parametrize("config", [None, GPT2], ids=["llama", "gpt2"])
def test_sampling_compiles_nothing(tiny_llama_config, graphs, config):
    policy, plain = both(config or tiny_llama_config)
    ids = torch.arange(1, 7).reshape(2, 3)
    parameters = SamplingParameters(5, greedy=True)
    found, expected = (sample(model, ids, torch.ones_like(ids), parameters=parameters) for model in (policy, plain))
    assert torch.equal(found.ids, expected.ids)
    assert graphs.frame_count == 0


def test_a_block_without_graphs_leaves_them_out(tiny_llama_config, graphs):
    policy, _ = both(tiny_llama_config)
    with without_graphs(policy):
        score(policy, segments(0))
    assert graphs.frame_count == 0


def test_copies_of_a_compiled_policy_are_compiled_and_saved_as_ever(tiny_llama_config, tiny_llama, tmp_path):
    policy, plain = both(tiny_llama_config)
    assert not is_compiled(copy.deepcopy(policy))
    assert not is_compiled(frozen_companion(None, plain).module)
    tiny_llama.save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    for found in (
        frozen_companion(None, policy),
        frozen_companion(path, policy),
        frozen_companion(None, policy, saved=True),
    ):
        assert is_compiled(found.module)
    for critic in (None, path):
        assert is_compiled(build_critic(critic, policy))
        assert not is_compiled(build_critic(critic, plain))
    exported = export_policy(policy, tmp_path / "export")
    again = build_policy(str(exported))
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(again.lm_head.weight, policy.lm_head.weight)


def test_refuses(tiny_llama_config, monkeypatch):
    with pytest.raises(ValueError, match=r"gradient_checkpointing='selective' would have no effect.*compile=True"):
        make(tiny_llama_config, compile=True, gradient_checkpointing="selective")
    with pytest.raises(ValueError, match=r"compile=True is not for quantized layers .policy.quantization='8bit'"):
        build_policy(PolicyConfig(path="model", compile=True, quantization="8bit", lora=LoraConfig(r=2)))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile=True needs a C.. compiler, and 'no-such-compiler' is not there"):
        make(tiny_llama_config, compile=True)
