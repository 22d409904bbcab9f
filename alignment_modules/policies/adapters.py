"""Adapters of `peft` in a model: finding them, switching them off, and their base with them merged in.

`peft` is imported when an adapter is met, never by importing this module.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.added_tokens import ends, is_untrained, trains_rows


def adapter_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Lists (name, module) of the outermost modules that `peft` put in place of others, in registration order."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in _every_layer(module):
        if not found or not name.startswith(f"{found[-1][0]}."):
            found.append((name, child))
    return found


def _every_layer(module: nn.Module) -> list[tuple[str, Any]]:
    """The same with those inside of others: of a module's several parameters each has a layer around the former."""
    if "peft" not in sys.modules:  # nobody can have made an adapter
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [(name, child) for name, child in module.named_modules() if isinstance(child, kinds)]


def has_adapter(module: nn.Module) -> bool:
    """Whether the module holds adapters that can be switched off."""
    return bool(adapter_layers(module))


@contextmanager
def adapter_off(policy: nn.Module) -> Iterator[nn.Module]:
    """Runs a block with every adapter of the policy switched off; afterwards all `requires_grad` flags are as before.

    Args:
        policy: A model with adapters.

    Yields:
        The policy, which now computes what its base computes.
    """
    layers = [layer for _, layer in _every_layer(policy)]
    disabled = [layer.disable_adapters for layer in layers]
    trainable = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield policy
    finally:
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer.enable_adapters(not was_disabled)
        for parameter, flag in trainable:  # peft's switch resets these to its own idea of them
            parameter.requires_grad_(flag)


def adapter_is_identity(policy: nn.Module) -> bool:
    """Whether switching the adapters off changes nothing now, and will restore this state after any training.

    False for an adapter that was trained before (its base is not the policy as it stands) and when parameters of the
    base are trainable too. Kinds of adapter other than LoRA count as not identical.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    own: set[int] = set()
    for _, layer in _every_layer(policy):
        if type(layer).__name__ == "TrainableTokensLayer":  # of a wrapper, which is another of the layers
            continue
        if isinstance(layer, ModulesToSaveWrapper):
            saved = [layer.modules_to_save[name] for name in layer.active_adapters]
            if any(not _equal(layer.original_module, module) for module in saved):
                return False
            own.update(id(p) for module in saved for p in module.parameters())
        elif trains_rows(layer):
            if not is_untrained(layer):
                return False
            own.update(id(p) for p in layer.token_adapter.trainable_tokens_delta.parameters())
        elif isinstance(layer, LoraLayer):
            ups = [layer.lora_B[n] for n in layer.active_adapters if n in layer.lora_B]
            values: list[Tensor] = [p for up in ups for p in up.parameters()]
            values += [layer.lora_embedding_B[n] for n in layer.active_adapters if n in layer.lora_embedding_B]
            if layer.merged or any(bool(value.detach().any()) for value in values if not value.is_meta):
                return False
            base = {id(p) for p in layer.get_base_layer().parameters()}
            own.update(id(p) for p in layer.parameters() if id(p) not in base)
        else:
            return False
    return all(id(p) in own for p in policy.parameters() if p.requires_grad)


def _equal(first: nn.Module, second: nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(left[key].is_meta or torch.equal(left[key], right[key]) for key in left)


def check_mergeable(policy: nn.Module) -> None:
    """Refuses adapters whose base would round them away.

    Args:
        policy: A model with adapters.

    Raises:
        ValueError: The base is quantized.
    """
    base: Any = policy.get_base_model() if hasattr(policy, "get_base_model") else policy  # type: ignore[operator]
    if getattr(base, "is_quantized", False):
        raise ValueError(
            "lora='merge': the base is quantized and merging would round the adapter away. Export with "
            "lora='adapter'; loading that folder without quantization merges it into the full-precision base."
        )


def merged_state(policy: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The weights of the policy's base with the active adapters merged in, computed beside the live model.

    One adapted layer is copied at a time, so the extra memory is the merged weights.

    Args:
        policy: A model with adapters.

    Returns:
        The base model (live, still holding its adapters) and the merged weights under the base's plain names.

    Raises:
        ValueError: A merged weight is not finite, or the base is quantized.
    """
    check_mergeable(policy)
    base: Any = policy.get_base_model() if hasattr(policy, "get_base_model") else policy  # type: ignore[operator]
    layers = adapter_layers(base)
    prefixes = tuple(f"{name}." for name, _ in layers)
    state = {key: value for key, value in base.state_dict().items() if not key.startswith(prefixes)}
    for name, layer in layers:
        for key, value in _merged_layer(name, layer).state_dict().items():
            state[f"{name}.{key}"] = value
    keys = [f"{name}.weight" for name, module in ends(base) if trains_rows(module)]
    if len(keys) == 2 and base.config.tie_word_embeddings:
        state[keys[1]] = state[keys[0]]  # merged apart, they are one matrix all the same
    return base, state


def _merged_layer(name: str, layer: nn.Module) -> nn.Module:
    twin: Any = copy.deepcopy(layer)
    try:
        if hasattr(twin, "unload_and_optionally_merge_module"):
            return twin.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        twin.merge(safe_merge=True)
    except ValueError as error:
        raise ValueError(f"The adapter of {name!r} cannot be merged: {error}") from error
    return twin.get_base_layer()
