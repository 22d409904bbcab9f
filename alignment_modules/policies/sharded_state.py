"""State of sharded modules: put together on one process, and filled from whole tensors part by part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.sharded import cut_as, whole


def is_distributed(value: Any) -> bool:
    """Whether a value is a tensor of which each process holds a part."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def own_state(module: nn.Module) -> dict[str, Any]:
    """A module's state dictionary, in which weights that are tied are one tensor under several names.

    Its tensors share their memory with the module's; distributed ones are the parts that this process holds.
    """
    detached: dict[int, Any] = {}
    state = module.state_dict(keep_vars=True)
    for value in state.values():
        detached.setdefault(id(value), value.detach() if isinstance(value, Tensor) else value)
    return {name: detached[id(value)] for name, value in state.items()}


def gather(values: Any, *, keep: bool) -> Any:
    """Dictionaries and lists with whole tensors in the place of distributed ones, one after the other.

    All processes call this, with the same keys in the same order; at most one tensor is whole where they are not kept.

    Args:
        values: Dictionaries and lists of tensors and anything else, nested.
        keep: Whether this process wants them. Distributed tensors are then whole, on the CPU.

    Returns:
        The same, a tensor that stands in several places still being one; None in the place of a distributed tensor
        that is not kept.
    """
    return _gather(values, keep, {})


def _gather(values: Any, keep: bool, seen: dict[int, Any]) -> Any:
    if isinstance(values, dict):
        return {key: _gather(value, keep, seen) for key, value in values.items()}
    if isinstance(values, list):
        return [_gather(value, keep, seen) for value in values]
    if not is_distributed(values):
        return values
    if id(values) not in seen:
        found = whole(values)
        seen[id(values)] = found.detach().cpu() if keep else None
    return seen[id(values)]


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Writes a tensor's values into one that may be distributed, without communication.

    Args:
        target: Plain or distributed.
        value: Whole, the same in all processes (it may lie in a file: only this process's part is read), or distributed
            as the target is.
    """
    if value is not target:
        target.copy_(cut_as(value, target))


def empty_for(parameter: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor for an entry that an optimizer keeps of a parameter.

    Args:
        parameter: Plain or distributed.
        size: The entry's.
        dtype: The entry's.

    Returns:
        Distributed as the parameter where it has its shape, held whole by each process where it has another, and plain
        where it is a number.
    """
    if size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if not is_distributed(parameter) or not size:
        return torch.empty(size, dtype=dtype, device=parameter.device if size else "cpu")
    from torch.distributed.tensor import Replicate, empty

    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    return empty(size, dtype=dtype, device_mesh=mesh, placements=[Replicate()] * mesh.ndim)
