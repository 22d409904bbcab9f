"""Tiny policies and a naive rescoring that shares no code with the sampler."""

import pytest
import torch
from torch import nn

from alignment_modules.rollouts import sampler
from alignment_modules.rollouts.decoders.base import RecomputeDecoder
from alignment_modules.rollouts.decoders.cached import CachedDecoder
from alignment_modules.rollouts.decoders.llama.decoder import FastDecoder

DECODERS = {"recompute": RecomputeDecoder, "cached": CachedDecoder, "fast": FastDecoder}
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


class Bigram(nn.Module):
    """A policy without transformers: causal, no cache, ids to logits."""

    def __init__(self, vocabulary=12):
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.past = nn.Embedding(vocabulary, vocabulary)

    def forward(self, ids):
        counts = torch.arange(1, ids.shape[1] + 1)[:, None]
        return 2 * self.table(ids) + self.past(ids).cumsum(1) / counts


@pytest.fixture
def make_policy():
    """Builds a small transformers model of a type in eval mode; norms get weights that are not all one."""

    def make(model_type="llama", **options):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**SIZES, **options})
        policy = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in policy.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, 1.0, 0.3)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, 0.0, 0.3)
        return policy

    return make


@pytest.fixture
def bigram():
    torch.manual_seed(0)
    return Bigram()


@pytest.fixture
def force(monkeypatch):
    """Makes `sample` use a decoder by name."""

    def use(name):
        monkeypatch.setattr(sampler, "select_decoder", lambda policy, longest: DECODERS[name])

    return use


@pytest.fixture
def rescore():
    """Log-probabilities of completions from one plain forward per row, without padding or cache."""

    def naive(policy, prompt_ids, prompt_mask, completions, temperature=1.0):
        rows = len(completions.ids) // len(prompt_ids)
        result = torch.zeros(completions.ids.shape, dtype=torch.float64)
        for row, (ids, mask) in enumerate(zip(completions.ids, completions.mask, strict=True)):
            prompt = prompt_ids[row // rows][prompt_mask[row // rows].bool()]
            tokens = ids[mask]
            with torch.no_grad():
                output = policy(torch.cat((prompt, tokens))[None])
            logits = getattr(output, "logits", output)[0, len(prompt) - 1 : -1].double()
            logps = torch.log_softmax(logits / temperature, -1).gather(1, tokens[:, None]).squeeze(1)
            result[row, : len(tokens)] = logps
        return result

    return naive
