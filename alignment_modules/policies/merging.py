"""The weights of a model with its adapters merged in, computed beside the live model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.added_tokens import ends, trains_rows
from alignment_modules.policies.lora import adapter_layers
from alignment_modules.policies.quantization import (
    PACKAGES,
    effective_layer,
    plain_shell,
    plain_state,
    quantized_layers,
)
from alignment_modules.policies.sharded import whole_copy


def check_mergeable(policy: nn.Module) -> None:
    """Refuses adapters on a base whose weights cannot be told.

    Args:
        policy: A model with adapters.

    Raises:
        ValueError: The base is stored in a quantization that is not one of `Quantization`.
    """
    base: Any = policy.get_base_model() if hasattr(policy, "get_base_model") else policy  # type: ignore[operator]
    if getattr(base, "is_quantized", False) and not quantized_layers(base):
        method = getattr(base, "quantization_method", "another method")
        raise ValueError(
            f"lora='merge': the base is quantized by {method}, and what its weights stand for is not known here. "
            f"Allowed are {list(PACKAGES)}; export with lora='adapter'."
        )


def merged_state(policy: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The weights of the policy's base with the active adapters merged in, computed beside the live model.

    One adapted layer is copied at a time, so the extra memory is the merged weights. Those of a quantized base are what
    it stands for, in full precision, so that they compute what was trained.

    Args:
        policy: A model with adapters.

    Returns:
        The base model (live, still holding its adapters; of a quantized one a plain one that holds the merged weights)
        and the merged weights under the base's plain names.

    Raises:
        ValueError: A merged weight is not finite, or cannot be told (`check_mergeable`).
    """
    check_mergeable(policy)
    base: Any = policy.get_base_model() if hasattr(policy, "get_base_model") else policy  # type: ignore[operator]
    dtype = getattr(base, "dtype", torch.float32)
    layers = adapter_layers(base)
    prefixes = tuple(f"{name}." for name, _ in layers)
    state = {key: value for key, value in plain_state(base, dtype).items() if not key.startswith(prefixes)}
    for name, layer in layers:
        for key, value in _merged_layer(name, layer, dtype).state_dict().items():
            state[f"{name}.{key}"] = value
    keys = [f"{name}.weight" for name, module in ends(base) if trains_rows(module)]
    if len(keys) == 2 and base.config.tie_word_embeddings:
        state[keys[1]] = state[keys[0]]  # merged apart, they are one matrix all the same
    return (plain_shell(base, state) if quantized_layers(base) else base), state


def merged_copy(policy: nn.Module) -> nn.Module:
    """A copy of the policy's base with the active adapters merged in, without quantization.

    Args:
        policy: A model with adapters.

    Raises:
        ValueError: As `merged_state`.
    """
    if quantized_layers(policy):
        return copy.deepcopy(merged_state(policy)[0])  # which shares what was not adapted
    check_mergeable(policy)
    twin: Any = copy.deepcopy(policy)
    return twin.merge_and_unload(safe_merge=True)


def _merged_layer(name: str, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    try:
        if quantized_layers(layer):
            return effective_layer(layer, dtype)
        twin: Any = whole_copy(layer)
        if hasattr(twin, "unload_and_optionally_merge_module"):
            return twin.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        twin.merge(safe_merge=True)
    except ValueError as error:
        raise ValueError(f"The adapter of {name!r} cannot be merged: {error}") from error
    return twin.get_base_layer()
