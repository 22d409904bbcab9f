"""Policies that carry adapters, and what they compute."""

import torch

from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy

TOKENS = torch.arange(1, 13).reshape(2, 6)


def policy(config, *, seed=0, **lora):
    torch.manual_seed(seed)
    return build_policy(PolicyConfig(config=config, dtype="float64", lora=LoraConfig(**lora)))


def train(model):
    """Moves the adapters away from zero, as training does."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits
