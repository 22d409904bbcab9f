"""The one door through which a model is sharded: torch's `fully_shard` (FSDP2) over transformer layers and the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from alignment_modules.policies.compiling import is_compiled
from alignment_modules.policies.forward import language_model
from alignment_modules.policies.frozen import Frozen
from alignment_modules.policies.layers import decoder_layers
from alignment_modules.policies.placing import check_alike, place
from alignment_modules.policies.sharded import GATHERED_IN, is_sharded
from alignment_modules.policies.value_head import ValueHead

T = TypeVar("T")
_SMALL = (torch.bfloat16, torch.float16)


def compute_dtype(precision: str) -> torch.dtype | None:
    """The dtype that layers are gathered in under a Trainer's precision; None: the one that they are held in."""
    return torch.bfloat16 if precision == "bf16-mixed" else None


def shard_children(module: nn.Module, mesh: DeviceMesh, *, gather: torch.dtype | None = None) -> None:
    """Shards what a module is made of: policy, critic and value head, references, teachers; each is one model.

    Args:
        module: A training module; what is sharded already stays as it is.
        mesh: One dimension, the processes that share the weights.
        gather: As in `shard`.

    Raises:
        ValueError: If the module has trainable parameters outside of its children, or as for `shard`.
    """
    own = [name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
    if own:
        raise ValueError(
            f"{type(module).__name__} has a parameter {own[0]!r} of its own, and what is sharded are the modules that "
            "it holds: put it into one (nn.Module), or use strategy='ddp'"
        )
    models = dict(models_in(module))
    check_alike("the models to be sharded", list(models))
    for name, model in models.items():
        shard(model, mesh, gather=gather, name=name)


def models_in(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The models that a module holds, by name: its children, those of its containers, and what is in a `Frozen`."""
    for name, child in module.named_children():
        if isinstance(child, Frozen):
            if child.module is not None:
                yield prefix + name, child.module
        elif isinstance(child, nn.ModuleDict | nn.ModuleList):
            yield from models_in(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield prefix + name, child


def shard(model: nn.Module, mesh: DeviceMesh, *, gather: torch.dtype | None = None, name: str = "policy") -> None:
    """Shards a model in place over the processes of a mesh; one that is sharded already stays as it is.

    All processes get the weights of the first one, which alone needs to hold them before (`policies.placing`).

    Each transformer layer is gathered by itself when it is computed, and freed after. What is outside of the layers
    (embeddings, a head, tied or not, norms) is one group, which stays gathered from the forward to the backward pass,
    so that `policies.reading` may apply the head by itself. Parameters may be frozen or not, and those of a group may
    be of several dtypes as long as the trainable ones are of one.

    Args:
        model: Any module. Its layers are the outermost list of modules that it runs one after the other, all of them in
            each forward pass; one without is a single group.
        mesh: One dimension.
        gather: The dtype that layers are gathered and computed in (under autocast: states between them keep theirs);
            gradients are summed in float32. None: the one that they are held in.
        name: What errors call the model.

    Raises:
        ValueError: If it is compiled as a whole or quantized, or one of its layers trains parameters of two dtypes.
    """
    if is_sharded(model):
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    _check(model, name)
    layers = find_layers(model)

    def apply(part: Any, is_layer: bool, dtype: torch.dtype | None) -> None:
        precision = MixedPrecisionPolicy(dtype, _reduced_in(part, dtype), cast_forward_inputs=False)
        fully_shard(part, mesh=mesh, reshard_after_forward=is_layer, mp_policy=precision)
        part.is_layer = is_layer

    def apply_all(_: nn.Module) -> None:
        for layer in layers:
            apply(layer, True, gather)
        for part in _of_another_dtype(model, layers):
            apply(part, False, None)
        apply(model, False, None)

    number = "" if mesh.device_type == "cpu" else f":{torch.accelerator.current_device_index()}"
    place(model, apply_all, torch.device(f"{mesh.device_type}{number}"))
    model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]  # an expert that one process did not need
    model.run_as_forward = _call  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_as_forward")
    if isinstance(model, ValueHead):
        register_fsdp_forward_method(model, "last")
    if gather is not None:
        GATHERED_IN[model] = gather


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a model runs one after the other: the entries of its outermost lists of modules with children.

    Args:
        model: Any module. Of a model of transformers it is the list that its configuration counts.
    """
    inner = language_model(model)
    if inner is not None:
        return decoder_layers(inner)
    return [layer for found in _outermost_lists(model) for layer in found]


def _outermost_lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    for child in module.children():
        entries = list(child) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        if len(entries) > 1 and all(_is_block(entry) for entry in entries):
            yield entries
        else:
            yield from _outermost_lists(child)


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _call(compute: Callable[[], T]) -> T:
    return compute()


def _reduced_in(module: nn.Module, gather: torch.dtype | None) -> torch.dtype | None:
    """float32 where gradients would be summed over the processes in 16 bits."""
    held = {parameter.dtype for parameter in _unsharded(module) if parameter.requires_grad}
    return torch.float32 if gather in _SMALL or held & {*_SMALL} else None


def _of_another_dtype(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules outside of the layers that train parameters of another dtype than most: a critic's head in float32."""
    inside = {id(part) for layer in layers for part in layer.modules()}
    holders = [
        (part, parameter.dtype)
        for part in model.modules()
        if id(part) not in inside
        for parameter in part.parameters(recurse=False)
        if parameter.requires_grad
    ]
    if len({dtype for _, dtype in holders}) < 2:
        return []
    usual = Counter(dtype for _, dtype in holders).most_common(1)[0][0]
    return list(dict.fromkeys(part for part, dtype in holders if dtype != usual and part is not model))


def _unsharded(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that no part of the module has in shards yet."""
    return (parameter for parameter in module.parameters() if not hasattr(parameter, "to_local"))


def _check(model: nn.Module, name: str) -> None:
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"{name} is compiled as a whole, and its layers are to be sharded one by one: give it uncompiled, or use "
            "strategy='ddp'"
        )
    if is_compiled(model):
        raise ValueError(
            f"{name} has compiled layers, which are not sharded: leave compile out of its configuration, or use "
            "strategy='ddp'"
        )
    quantized = [key for key, parameter in model.named_parameters() if not parameter.is_floating_point()]
    quantized += [key for key, parameter in model.named_parameters() if type(parameter.data) is not torch.Tensor]
    if quantized or getattr(model, "is_quantized", False):
        raise ValueError(
            f"{name} is quantized{f' ({quantized[0]!r})' if quantized else ''}, and quantized weights are not sharded: "
            "use strategy='ddp', or leave quantization out"
        )
    for layer in find_layers(model):
        held = sorted({str(p.dtype).removeprefix("torch.") for p in layer.parameters() if p.requires_grad})
        if len(held) > 1:
            raise ValueError(
                f"{name}: a {type(layer).__name__} trains parameters of {' and '.join(held)}, and those that are "
                "sharded together must have one dtype: load it in one (policy.dtype)"
            )
