"""Models and tokenizers that the tests of all paradigms share: tiny, and the same each time."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.critic import scalar_copy
from alignment_modules.policies.lora import add_lora
from tests.shapes import SIZES

MIXTRAL = {
    "model_type": "mixtral",
    **SIZES,
    "intermediate_size": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.25,
}
"""A mixture of experts that asks for its load to be balanced."""


class Stops:
    """A tokenizer of ids that ends texts with 7: enough to tell what was cut off."""

    eos_token_id, pad_token_id = 7, 0

    def __len__(self) -> int:
        return 40


class Plain(nn.Module):
    """A causal policy without transformers: ids to logits."""

    def __init__(self, outputs: int = 40) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 16), nn.Linear(16, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        """Of a token and the mean of those before it."""
        states = self.table(ids)
        return self.head(states + states.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None])


def adapted(policy: nn.Module, **options: Any) -> nn.Module:
    """A policy with LoRA adapters, of these options, that do something already."""
    torch.manual_seed(2)
    return moved(add_lora(copy.deepcopy(policy), LoraConfig(r=2, alpha=4, **options)))


def quantized(policy: nn.Module, kind: str, folder: Path, head: str = "lm") -> nn.Module:
    """A policy whose linear layers are held in fewer bits, with LoRA adapters that do something already.

    Args:
        policy: A language model of transformers.
        kind: `PolicyConfig.quantization`.
        folder: Where the model is written to, and read from.
        head: As in `PolicyConfig`.
    """
    if not (folder / "config.json").is_file():
        policy.save_pretrained(folder)
    torch.manual_seed(2)
    options = {"quantization": kind, "lora": LoraConfig(r=2, alpha=4), "head": head}
    return moved(build_policy(PolicyConfig(path=str(folder), **options)))


def moved(policy: nn.Module) -> nn.Module:
    """With adapters that are not 0."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                parameter.normal_(0.0, 0.1)
    return policy


def other_than(policy: nn.Module) -> nn.Module:
    """A frozen model near a policy."""
    torch.manual_seed(3)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return other


def critic_beside(policy: nn.Module) -> nn.Module:
    """A critic of a policy's kind, whose head is not 0."""
    if not hasattr(policy, "lm_head"):
        torch.manual_seed(5)
        return Plain(1)
    critic = scalar_copy(other_than(policy))
    torch.nn.init.normal_(critic.score.weight, std=0.2)
    return critic


def flat(policy: nn.Module) -> nn.Module:
    """A policy to which every token is as likely."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    return policy
