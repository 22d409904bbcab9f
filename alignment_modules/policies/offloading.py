"""Offload of activations: what the backward pass needs of the forward pass waits in the host's memory meanwhile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_MARK = "activations_are_offloaded"
_SMALLEST = 1024  # bytes of a tensor that is worth a copy


def offload_activations(model: nn.Module) -> None:
    """Has `read` keep what it saves for the backward pass on the host.

    Args:
        model: The policy or critic, as it is read.
    """
    setattr(model, _MARK, True)


def is_offloaded(model: nn.Module) -> bool:
    """Whether `offload_activations` was called."""
    return getattr(model, _MARK, False)


def offload_as(policy: nn.Module, copy: nn.Module) -> nn.Module:
    """Offloads the activations of a copy of a policy where those of the policy are offloaded; returns the copy."""
    if is_offloaded(policy):
        offload_activations(copy)
    return copy


def offloaded(model: nn.Module) -> AbstractContextManager[Any]:
    """A forward pass inside the block keeps what it saves on the host, and its backward pass takes it back.

    Weights stay where they are, and so do tensors below 1 KiB. On CUDA the host's copies are pinned, so that neither
    way waits for the other work in the queue.

    Args:
        model: Nothing happens where `offload_activations` was not called for it, or no gradients are wanted.
    """
    if not is_offloaded(model) or not torch.is_grad_enabled():
        return nullcontext()
    weights = {_storage(p) for p in model.parameters() if type(p) is nn.Parameter}

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if type(tensor) is not Tensor or tensor.nbytes < _SMALLEST or _storage(tensor) in weights:
            return tensor
        pinned = tensor.device.type == "cuda"
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=pinned)
        return tensor.device, copy.copy_(tensor.detach(), non_blocking=pinned)

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def check_offloading(module: nn.Module, device: torch.device, *, sharded: bool) -> None:
    """Refuses offload where it has no effect, or would take weights along.

    Args:
        module: Holds policy and critic.
        device: Where they are trained.
        sharded: Whether weights lie in shards.

    Raises:
        ValueError: If activations of some model of it are offloaded and `device` shares the host's memory, or the
            weights are gathered for each pass.
    """
    for name, model in module.named_children():
        if not is_offloaded(model):
            continue
        given = f"{name}.activation_offloading=True"
        if device.type in ("cpu", "mps"):
            raise ValueError(
                f"{given} has no effect on {device.type!r}, whose activations are in the host's memory: leave it out, "
                f"or use {name}.gradient_checkpointing"
            )
        if sharded:
            raise ValueError(
                f"{given} is not for sharded weights, which are gathered for each pass and could not be told from "
                f"activations: use {name}.gradient_checkpointing, or strategy='ddp'"
            )
