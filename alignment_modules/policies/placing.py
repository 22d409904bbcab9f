"""A module that is sharded while only the first process holds its weights, and put together again there."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.probing import Capabilities, adopt, prepare
from alignment_modules.policies.sharded import is_sharded
from alignment_modules.policies.sharded_state import gather, is_distributed, own_state

# By sharded module: a copy of it as it was before, without weights; in the first process.
_SHELLS: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Told:
    """What the first process tells the others of a module."""

    capabilities: Capabilities
    random: Tensor
    entries: list[tuple[str, torch.Size]]
    dtypes: list[torch.dtype]
    absent: bool


def place(module: nn.Module, shard: Callable[[nn.Module], Any], device: torch.device) -> None:
    """Shards a module, and hands each process its parts of the first one's weights, tensor by tensor.

    All processes call this with the same module. Those but the first may have built it on the meta device
    (`on_first_process`); whatever they hold is replaced, so that all start from the same weights. They also take over
    what was found out about the module with them, and where they held nothing the first one's random state, which
    drawing the weights has moved.

    Args:
        module: What is sharded, in place. In the first process it lies on the CPU, or where its parts are to lie.
        shard: Shards it; its weights are on the meta device meanwhile.
        device: Where the parts are to lie.

    Raises:
        ValueError: If the first process holds no weights either, or another process has built another module.
    """
    first, slots = torch.distributed.get_rank() == 0, list(_slots(module))
    values: list[Any] = [getattr(owner, name) for owner, name in slots]
    mine = [(name, value.shape) for (_, name), value in zip(slots, values, strict=True)]
    absent = any(value.is_meta for value in values)
    told: list[Any] = [None]
    if first:
        told = [_Told(prepare(module), torch.get_rng_state(), mine, [value.dtype for value in values], absent)]
    torch.distributed.broadcast_object_list(told)
    facts: _Told = told[0]
    agree(_objection(module, facts, mine))
    _empty(module, values, facts.dtypes)
    if first:
        _SHELLS[module] = copy.deepcopy(module)
    else:
        values = [None] * len(values)  # what another process built is not needed
    shard(module)
    module.to_empty(device=device)
    for number, (owner, name) in enumerate(slots):
        if getattr(owner, name).is_meta:  # neither a parameter nor a buffer
            setattr(owner, name, torch.empty_like(getattr(owner, name), device=device))
        value, values[number] = values[number], None
        _hand_out(None if value is None else value.detach(), getattr(owner, name))
    if absent:
        torch.set_rng_state(facts.random)
    if not first:
        adopt(module, facts.capabilities)


def assemble(module: nn.Module) -> nn.Module | None:
    """A module of plain tensors, in the first process; all processes call this.

    Args:
        module: Any module.

    Returns:
        The module itself where it is not sharded. Otherwise a copy with all weights on the CPU in the first process,
        and None in the others, which hold one tensor at a time.

    Raises:
        ValueError: It was not sharded by `place`.
    """
    if not is_sharded(module):
        return module
    first = torch.distributed.get_rank() == 0
    state = gather(own_state(module), keep=first)
    if not first:
        return None
    if module not in _SHELLS:
        raise ValueError(f"{type(module).__name__} was sharded elsewhere, so that it cannot be put together")
    twin = copy.deepcopy(_SHELLS[module])
    names = {name for name, _ in twin.named_parameters(remove_duplicate=False)}
    parameters = {id(value): nn.Parameter(value, requires_grad=False) for n, value in state.items() if n in names}
    state = {name: parameters[id(value)] if name in names else value for name, value in state.items()}
    twin.load_state_dict(state, assign=True)
    for (owner, name), (other, _) in zip(_slots(twin), _slots(module), strict=True):
        if getattr(owner, name).is_meta:  # what no state dictionary holds
            setattr(owner, name, getattr(other, name).detach().cpu())
    return twin


def _slots(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where the tensors of a module are, each once, in an order that its structure alone gives."""
    seen = set()
    for child in module.modules():
        for name, value in _tensors(child):
            if id(value) not in seen:
                seen.add(id(value))
                yield child, name


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own parameters, buffers and other attributes that are tensors; not those of its children."""
    held: list[tuple[str, Tensor]] = [*module.named_parameters(recurse=False, remove_duplicate=False)]
    held += module.named_buffers(recurse=False, remove_duplicate=False)
    return held + sorted((name, value) for name, value in vars(module).items() if isinstance(value, Tensor))


def agree(objection: str | None) -> None:
    """Has all processes go on, or none; all call this.

    Args:
        objection: Why this one cannot.

    Raises:
        ValueError: With the objection of the first process that has one.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, objection)
    for message in filter(None, found):
        raise ValueError(message)


def check_alike(what: str, value: Any) -> None:
    """Refuses processes that are about to do different things, which would wait for each other; all call this.

    Args:
        what: What the value is, for the message.
        value: Anything plain.

    Raises:
        ValueError: If it is not the same in all processes.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    if any(other != found[0] for other in found):
        raise ValueError(f"{what} differ between the processes, which must all build the same module: {found}")


def _objection(module: nn.Module, facts: _Told, mine: list[tuple[str, torch.Size]]) -> str | None:
    """Why a module cannot take over the first process's weights; None: it can."""
    name, rank = type(module).__name__, torch.distributed.get_rank()
    if facts.absent:
        return (
            f"{name} has no weights in the first process either: build it outside of `torch.device('meta')`, or in "
            "`on_first_process`, which leaves them out in the other processes alone"
        )
    if mine == facts.entries:
        return None
    pairs = zip(mine, facts.entries, strict=False)
    differ = next((f"{ours} against {theirs}" for ours, theirs in pairs if ours != theirs), "the number of them")
    return (
        f"{name} has {len(mine)} tensors in process {rank} and {len(facts.entries)} in the first one, which differ in "
        f"{differ}: all processes must build the same module"
    )


def _empty(module: nn.Module, values: list[Tensor], dtypes: list[torch.dtype]) -> None:
    """Puts shapes in the place of a module's tensors; what is tied stays so."""
    shapes: dict[int, Tensor] = {}
    for value, dtype in zip(values, dtypes, strict=True):
        shape = torch.empty_like(value, dtype=dtype, device="meta", requires_grad=False)
        trained = value.requires_grad
        shapes[id(value)] = nn.Parameter(shape, requires_grad=trained) if isinstance(value, nn.Parameter) else shape
    for child in module.modules():
        for name, value in _tensors(child):
            setattr(child, name, shapes[id(value)])


@torch.no_grad()
def _hand_out(value: Tensor | None, target: Tensor) -> None:
    """Gives each process its part of a tensor that the first one has."""
    if not is_distributed(target):
        if value is not None:
            target.copy_(value)
        torch.distributed.broadcast(target, src=0)
        return
    from torch.distributed.tensor import distribute_tensor

    if value is None:
        value = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    mesh: Any = target.device_mesh  # type: ignore[attr-defined]
    target.copy_(distribute_tensor(value, mesh, target.placements))  # type: ignore[attr-defined]
