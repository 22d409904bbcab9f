"""Compiled layers: the numbers of eager ones, few graphs whatever the lengths, and none where something is sampled.

Most tests run the traced and differentiated graphs without a C++ compiler; those marked slow compile them.
"""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from alignment_modules.policies.compiling import is_compiled
from alignment_modules.policies.critic import build_critic
from alignment_modules.policies.frozen import frozen_companion
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.modes import disable_dropout, reading_mode
from alignment_modules.policies.scoring import score
from alignment_modules.policies.segments import Segments
from alignment_modules.rollouts import SamplingParameters, sample

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 40}
GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
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


@pytest.fixture
def inductor(monkeypatch):
    """Compiles with torch's own compiler, in this process."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make(config, **options):
    torch.manual_seed(0)
    return build_policy(PolicyConfig(config=config, **options))


def segments(seed):
    """Prompts with two completions each, of other lengths for every seed."""
    generator = torch.Generator().manual_seed(seed)
    widths = (3 + seed, 4 + 2 * seed)
    rows = 2 + seed % 3
    ids = [torch.randint(1, 40, (count, width), generator=generator) for count, width in zip((rows, 2 * rows), widths)]
    masks = [
        torch.arange(part.shape[1])[None] < torch.randint(1, part.shape[1] + 1, (len(part), 1), generator=generator)
        for part in ids
    ]
    return Segments.from_prompts(ids[0], masks[0], ids[1], masks[1])


def gradients(policy, seed):
    policy.zero_grad()
    logps = score(policy, segments(seed)).token_logps
    logps.square().sum().div(len(logps)).backward()
    return logps.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
