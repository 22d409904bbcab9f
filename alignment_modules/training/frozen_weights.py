"""Weights that a run does not train: left out of its checkpoints, and recognised by their bytes when it resumes."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from alignment_modules.policies.adapter_start import is_of_start
from alignment_modules.policies.fingerprints import fingerprints
from alignment_modules.policies.frozen import companions
from alignment_modules.policies.quantization import quantized_entries, stored_parts
from alignment_modules.policies.sharded import free


def frozen_children(module: nn.Module) -> dict[str, nn.Module]:
    """The children that have parameters of which none is trained, by name."""
    found = {}
    for name, child in module.named_children():
        flags = {parameter.requires_grad for parameter in child.parameters()}
        if flags == {False}:
            found[name] = child
    return found


class FrozenWeights:
    """The parameters of a module that are frozen at the start of a fit, and the buffers of its frozen children.

    Companions (`Frozen`) look after themselves and are not among them, nor is what adapters started with: it would have
    to be computed again, which another machine does in another order of operations.

    Args:
        module: The module, as it is about to be trained.
        kept: Names of children whose weights a checkpoint keeps, frozen or not.
    """

    def __init__(self, module: nn.Module, kept: Iterable[str] = ()) -> None:
        free(module)
        held = tuple(f"{name}." for name in (*companions(module), *kept))
        whole = tuple(f"{name}." for name in frozen_children(module))
        frozen = [(name, p) for name, p in _parameters(module) if not (p.requires_grad or is_of_start(name))]
        frozen += [(name, b) for name, b in _buffers(module) if name.startswith(whole)]
        # PyTorch counts the changes of a tensor, so that one which is thawed and frozen again is known to have moved.
        self._versions = {name: tensor._version for name, tensor in frozen if not name.startswith(held)}
        self._fingerprints: dict[str, str] = {}

    def leave_out(self, module: nn.Module, state: dict[str, Any], *, describe: bool) -> dict[str, str]:
        """Removes what is frozen still, and as it was at the start, from a state dictionary.

        Args:
            module: The module of the constructor.
            state: Its state dictionary; changed.
            describe: Whether fingerprints are wanted; a weight is read for its fingerprint once in a run.

        Returns:
            The fingerprint of each entry left out; empty without `describe`.
        """
        free(module)
        now = [*_parameters(module), *_buffers(module)]
        still = {n for n, t in now if not t.requires_grad and self._versions.get(n) == t._version}
        keys = [key for key in state if any(name in still for name in _prefixes(key))]
        # a quantized weight has entries of its own below its name, or beside it
        quantized = quantized_entries(module, state) - set(keys)
        keys += [key for key in state if key in quantized and f"{key.rpartition('.')[0]}.weight" in still]
        if describe:
            new = [(key, state[key]) for key in keys if key not in self._fingerprints]
            self._fingerprints.update(fingerprints(new))
        for key in keys:
            del state[key]
        return {key: self._fingerprints[key] for key in keys} if describe else {}


def others(state: Mapping[str, Any], own: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Which of some entries are in a state dictionary not as the module itself has them."""
    apart = [key for key in keys if key in state and not (key in own and _at_one_place(state[key], own[key]))]
    found, now = (fingerprints([(key, values.get(key)) for key in apart]) for values in (state, own))
    return [key for key in apart if found[key] != now[key]]


def _at_one_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, so that nothing need be read to compare them."""
    first, second = stored_parts(one), stored_parts(other)
    return [part.data_ptr() for part in first] == [part.data_ptr() for part in second]


def put_back(state: dict[str, Any], own: dict[str, Any], left_out: dict[str, str], where: str) -> None:
    """Adds the entries that `leave_out` removed, as the module that is to be restored has them.

    Args:
        state: The checkpoint's state dictionary; changed.
        own: The state dictionary of the module.
        left_out: What `leave_out` returned when the checkpoint was written.
        where: What the checkpoint is called in an error.

    Raises:
        ValueError: If the module lacks an entry or has another in its place.
    """
    present = [(key, own[key]) for key in left_out if key in own]
    now = dict(fingerprints(present))
    other = [key for key, saved in left_out.items() if now.get(key) != saved]
    if other:
        names = f"{', '.join(other[:3])}{', ...' if len(other) > 3 else ''}"
        raise ValueError(
            f"{where} holds what was trained alone, on top of {len(left_out)} frozen tensors; this model has others in "
            f"the place of {len(other)} of them ({names}). Build the policy from the same base, in the same dtype, as "
            "in the run that wrote it"
        )
    state.update(present)


def check_keys(own: Collection[str], found: Collection[str], where: str, module: nn.Module) -> None:
    """Refuses a state dictionary that is not the module's.

    Args:
        own: The names of the module's entries.
        found: Those of the dictionary's.
        where: What it is called in an error.
        module: The module.

    Raises:
        RuntimeError: If the names differ.
    """
    missing, unknown = [key for key in own if key not in found], [key for key in found if key not in own]
    if missing or unknown:
        raise RuntimeError(
            f"{where} does not fit {type(module).__name__}. Missing key(s) in state_dict: {some_of(missing)}. "
            f"Unexpected key(s) in state_dict: {some_of(unknown)}. Build the module as in the run that wrote the "
            "checkpoint."
        )


def some_of(keys: list[str]) -> str:
    """How many keys there are, and the first of them, for an error."""
    return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "none"


def _parameters(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return module.named_parameters(remove_duplicate=False)


def _buffers(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return module.named_buffers(remove_duplicate=False)


def _prefixes(key: str) -> Iterable[str]:
    parts = key.split(".")
    return (".".join(parts[:length]) for length in range(len(parts), 0, -1))
