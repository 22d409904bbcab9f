"""Adapters of `peft` in a model: finding them, switching them off, and their base with them merged in.

`peft` is imported when an adapter is met, never by importing this module.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.added_tokens import ends, is_untrained, trains_rows
from alignment_modules.policies.quantization import (
    PACKAGES,
    effective_layer,
    plain_shell,
    plain_state,
    quantized_layers,
)
from alignment_modules.policies.sharded import whole_copy
from alignment_modules.policies.weights import has_weights

START = "start"
"""Name of the adapter that takes away what a policy's adapters start with (`adapter_start`)."""


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


def lora_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """Lists (name, module) of the layers with LoRA adapters, in registration order."""
    return [(name, layer) for name, layer in _every_layer(module) if _is_lora(layer)]


def has_adapter(module: nn.Module) -> bool:
    """Whether the module holds adapters that can be switched off."""
    return bool(adapter_layers(module))


@contextmanager
def adapter_off(policy: nn.Module) -> Iterator[nn.Module]:
    """Runs a block with every adapter of the policy switched off; all `requires_grad` flags stay as they are.

    Args:
        policy: A model with adapters.

    Yields:
        The policy, which now computes what its base computes.
    """
    with _switched(policy, lambda layer: layer.enable_adapters(False)):
        yield policy


@contextmanager
def adapter_alone(policy: nn.Module, name: str) -> Iterator[nn.Module]:
    """Runs a block with one adapter of a policy on its base, in place of those that are on; then all is as before.

    Modules that are trained whole, and rows of added tokens, are the base's inside the block.

    Args:
        policy: A model with several adapters.
        name: The adapter's name in `policy.peft_config`.

    Yields:
        The policy, which now computes what its base with this adapter computes.
    """

    def choose(layer: Any) -> None:
        layer.enable_adapters(_is_lora(layer))
        if _is_lora(layer):
            layer.set_adapter([name])

    with _switched(policy, choose):
        yield policy


@contextmanager
def _switched(policy: nn.Module, change: Callable[[Any], None]) -> Iterator[None]:
    layers = [layer for _, layer in _every_layer(policy)]
    before = [(layer.disable_adapters, list(layer.active_adapters)) for layer in layers]
    trainable = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    try:
        for layer in layers:
            change(layer)
        _set_trainable(trainable)  # also here: a sharded model finds out in its first forward pass what it will reduce
        yield
    finally:
        for layer, (off, active) in zip(layers, before, strict=True):
            if list(layer.active_adapters) != active:
                layer.set_adapter(active)
            layer.enable_adapters(not off)
        _set_trainable(trainable)


def _set_trainable(flags: list[tuple[nn.Parameter, bool]]) -> None:
    """Undoes peft's switches, which reset `requires_grad` to their own idea of it."""
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _is_lora(layer: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(layer, LoraLayer)


def adapter_is_identity(policy: nn.Module) -> bool:
    """Whether switching the adapters off changes nothing now, and will restore this state after any training."""
    return why_not_off(policy) is None


def why_not_off(policy: nn.Module) -> str | None:
    """Why the policy with its adapters off is not the policy as it stands, now or after some training.

    Args:
        policy: A model with adapters.

    Returns:
        The reason, to be read after "since"; None where switching them off changes nothing now and gives this very
        model after any training.
    """
    from peft.utils.other import ModulesToSaveWrapper

    for name, layer in _every_layer(policy):
        if type(layer).__name__ == "TrainableTokensLayer":  # of a wrapper, which is another of the layers
            continue
        if isinstance(layer, ModulesToSaveWrapper):
            saved = [layer.modules_to_save[adapter] for adapter in layer.active_adapters]
            if any(not _equal(layer.original_module, module) for module in saved):
                return f"its {name!r}, which is trained whole, was trained before"
        elif trains_rows(layer):
            if not is_untrained(layer):
                return "rows of its added tokens were trained before"
        elif not _is_lora(layer):
            return "its adapters are of another kind than LoRA"
        elif layer.merged or _changes_base(layer):
            return "its adapters were trained before"
    moved = trained_base(policy)
    return f"{moved[0]!r} of its base is trained, too" if moved else None


def trained_base(policy: nn.Module) -> list[str]:
    """Names of the trained parameters of a policy that are not of its adapters, nor of what they train whole."""
    own: set[int] = set()
    for _, layer in _every_layer(policy):
        base = layer.original_module if hasattr(layer, "original_module") else layer.get_base_layer()
        own |= {id(p) for p in layer.parameters()} - {id(p) for p in base.parameters()}
    return [name for name, p in policy.named_parameters() if p.requires_grad and id(p) not in own]


def _changes_base(layer: Any) -> bool:
    """Whether the active adapters of a LoRA layer change what its base computes."""
    names = [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]
    if START in names:
        rest = [name for name in names if name != START]
        return len(rest) != 1 or not _is_at_start(layer, rest[0])
    values: list[Tensor] = [p for name in names if name in layer.lora_B for p in layer.lora_B[name].parameters()]
    values += [layer.lora_embedding_B[name] for name in names if name in layer.lora_embedding_B]
    return any(bool(value.detach().any()) for value in values if not value.is_meta) or any(
        _changes_magnitude(layer, name) for name in names if name in layer.lora_magnitude_vector
    )


def _is_at_start(layer: Any, name: str) -> bool:
    ups, downs = layer.lora_B, layer.lora_A
    if ups[name].weight.is_meta:
        return True
    return torch.equal(ups[name].weight, -ups[START].weight) and torch.equal(downs[name].weight, downs[START].weight)


def _changes_magnitude(layer: Any, name: str) -> bool:
    """Whether an adapter of DoRA without an update scales the outputs of its base."""
    from peft.utils.integrations import dequantize_module_weight

    magnitude = layer.lora_magnitude_vector[name]
    if magnitude.weight.is_meta:
        return False
    weight = dequantize_module_weight(layer.get_base_layer()).detach()
    norm = magnitude.get_weight_norm(weight, weight.new_zeros(()), layer.scaling[name])
    return not torch.equal(magnitude.weight.detach(), norm.to(magnitude.weight))


def _equal(first: nn.Module, second: nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(left[key].is_meta or torch.equal(left[key], right[key]) for key in left)


def adapter_weights(policy: nn.Module, name: str) -> nn.Module:
    """The parameters of one adapter of a policy, as they are, in a module of their own."""
    found = nn.Module()
    for key, parameter in policy.named_parameters():
        if f".{name}." in key and ".lora_" in key:
            found.register_parameter(key.replace(".", "/"), parameter)
    return found


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
    return twin.merge_and_unload(safe_merge=has_weights(twin))  # shapes alone are always finite


def _merged_layer(name: str, layer: Any, dtype: torch.dtype) -> nn.Module:
    if _is_lora(layer) and START in layer.active_adapters:
        return _merged_with_start(name, layer)
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


def _merged_with_start(name: str, layer: Any) -> nn.Module:
    """Adds the sum of the updates: alone each is large, and a base in 16 bits would round it."""
    twin: Any = whole_copy(layer)
    base = twin.get_base_layer()
    with torch.no_grad():
        update = sum(twin.get_delta_weight(adapter) for adapter in twin.active_adapters)
        base.weight.add_(update.to(base.weight.dtype))
    if not torch.isfinite(base.weight).all():
        raise ValueError(f"The adapter of {name!r} cannot be merged: its update is not finite")
    return base
