"""What of a policy is pushed to another process, and by which name it is known there."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn

from alignment_modules.policies.adapters import has_adapter
from alignment_modules.policies.fingerprints import fingerprints


def check_pushable(policy: nn.Module, *, lora: str) -> None:
    """Refuses a policy whose weights another program cannot read.

    Args:
        policy: The policy.
        lora: "adapter": of a LoRA policy the adapter is read by itself; "merge": in the weights.

    Raises:
        ValueError: If it is sharded or no transformers model, or vLLM reads no adapter of its kind.
    """
    if any(hasattr(parameter, "full_tensor") for parameter in policy.parameters()):
        raise ValueError(
            "VLLMEngine cannot push a policy that is sharded over processes: train with one process or with the "
            "strategy 'ddp', or sample in process (engine=None)"
        )
    model: Any = getattr(policy, "_orig_mod", policy)  # torch.compile's wrapper
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"VLLMEngine cannot push {type(model).__name__}: a server reads models of transformers; sample in process "
            "(engine=None)"
        )
    if lora == "merge" or not has_adapter(policy):
        return
    config = model.peft_config[model.active_adapter]
    for option in ("use_dora", "modules_to_save", "trainable_token_indices"):
        if value := getattr(config, option, None):
            raise ValueError(
                f"lora.{option}={value!r}: vLLM reads no adapter with it; push it with the base (engine option "
                "lora='merge'), or train without"
            )


def name_of(policy: nn.Module) -> str:
    """A name for the weights as they are: equal weights have equal names, in every process.

    What is frozen stays what it was, so only what is trained is hashed, or everything where nothing is.

    Args:
        policy: The policy.
    """
    trained: list[tuple[str, Any]] = [(name, one) for name, one in policy.named_parameters() if one.requires_grad]
    entries = fingerprints(trained or [*policy.state_dict().items()])
    return "policy-" + hashlib.blake2b(repr(sorted(entries.items())).encode(), digest_size=8).hexdigest()
