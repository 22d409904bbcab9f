"""Computing with a model whose weights lie in shards on several processes (`policies.sharding` puts them there).

All processes must do the same of it, the same number of times: its weights are gathered together. Every function here
leaves a model that is not sharded alone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

T = TypeVar("T")

# By sharded model: the dtype that its layers are gathered in, where it is another than the one they are held in.
GATHERED_IN: WeakKeyDictionary[nn.Module, torch.dtype] = WeakKeyDictionary()
_WHOLE: WeakSet[nn.Module] = WeakSet()


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's own weights lie in shards."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: then nothing can be
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def sharded_parts(module: nn.Module) -> list[Any]:
    """The modules within that are sharded each for itself, from the outside in."""
    return [part for part in module.modules() if is_sharded(part)]


def class_of(module: nn.Module) -> type:
    """A module's class, as it was before it was sharded."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return next(cls for cls in type(module).__mro__ if fsdp is None or not issubclass(cls, fsdp.FSDPModule))


def local(tensor: Any) -> Tensor:
    """The part of a tensor that is on this process: of one that is not sharded, all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Tensor:
    """A tensor gathered from all processes, which must all call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def cut_as(tensor: Tensor, parameter: Any) -> Tensor:
    """A tensor in shards like those of a parameter of the same shape; as it is where the parameter has none."""
    if not hasattr(parameter, "to_local"):
        return tensor
    if hasattr(tensor, "redistribute"):
        return tensor.redistribute(parameter.device_mesh, parameter.placements)
    from torch.distributed.tensor import distribute_tensor

    # every process has the same: none has to send it
    return distribute_tensor(tensor.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_copy(module: nn.Module) -> nn.Module:
    """A copy of a part of a model, its parameters gathered from all processes, which must all call this.

    Args:
        module: Whose own class is not sharded, such as a layer with adapters.
    """
    parts: dict[int, Any] = {}
    for parameter in module.parameters():
        if hasattr(parameter, "full_tensor"):
            parts[id(parameter)] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
    return copy.deepcopy(module, parts)


def free(model: nn.Module) -> None:
    """Frees what is gathered of a model: its parameters are the shards again. No graph of it may be waiting.

    Args:
        model: As it was given to `shard`, or any other.
    """
    for part in sharded_parts(model):
        part.reshard()


def steady_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that stay the same tensors from pass to pass: of a sharded model those of its layers, if it has any.

    Args:
        model: As it was given to `shard`, or any other.
    """
    layers = [part for part in sharded_parts(model) if part.is_layer]
    return [parameter for part in layers or [model] for parameter in part.parameters()]


def forward_pass(model: nn.Module, compute: Callable[[], T]) -> T:
    """Runs a computation as a forward pass of a model, within which its parts may be called one by one.

    What the model holds outside of its layers (embeddings, norms, heads) stays gathered afterwards, until the backward
    pass has ended: a head may be applied to what the computation gives.

    Args:
        model: As it was given to `shard`, or any other model, for which this is the computation alone.
        compute: What it returns may be a tensor, or a tuple, list or dictionary of such.
    """
    if not is_sharded(model):
        return compute()
    with _as_gathered(model):
        return model.run_as_forward(compute)  # type: ignore[operator]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside the block a model is whole on each process, and computes without waiting for the others.

    For what each process does for itself, such as writing completions of other lengths. It needs memory for all of the
    weights. Blocks may be nested. No graph of the model may be waiting for its backward pass.

    Args:
        model: As it was given to `shard`, or any other.
    """
    parts = [] if model in _WHOLE else sharded_parts(model)
    if not parts:
        yield
        return
    forward_pass(model, _nothing)  # torch finds out with the first pass what belongs together
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    _WHOLE.add(model)
    try:
        with _as_gathered(model):
            yield
    finally:
        _WHOLE.discard(model)
        for part in parts:
            part.set_reshard_after_forward(part.is_layer, recurse=False)
            part.reshard()


def is_whole(model: nn.Module) -> bool:
    """Whether all of a model's weights are on this process now."""
    return model in _WHOLE or not sharded_parts(model)


def agreed(model: nn.Module, holds: bool) -> bool:
    """Whether something holds on all processes, where these must compute together; else whether it holds here.

    Args:
        model: The model that is computed with.
        holds: What this process knows.
    """
    if not is_sharded(model) or model in _WHOLE:
        return holds
    flag = torch.tensor(int(holds), device=local(next(model.parameters())).device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)


def _nothing() -> None:
    return None


def _as_gathered(model: nn.Module) -> AbstractContextManager[Any]:
    """Autocast to the dtype that the layers are gathered in, where that is not on already."""
    dtype = GATHERED_IN.get(model)
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    if dtype is None or torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype=dtype)
