"""Weights that a run does not train: left out of its checkpoints, and recognised by their bytes when it resumes."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from alignment_modules.policies.reference import fingerprints


class FrozenWeights:
    """The parameters of a module that are frozen at the start of a fit, but for those of its `reference`.

    Args:
        module: The module, as it is about to be trained.
    """

    def __init__(self, module: nn.Module) -> None:
        frozen = ((name, p) for name, p in _parameters(module) if not p.requires_grad)
        # PyTorch counts the changes of a tensor, so that one which is thawed and frozen again is known to have moved.
        self._versions = {name: p._version for name, p in frozen if not name.startswith("reference.")}
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
        still = {n for n, p in _parameters(module) if not p.requires_grad and self._versions.get(n) == p._version}
        # a quantized weight has entries of its own below its name
        keys = [key for key in state if any(name in still for name in _prefixes(key))]
        if describe:
            new = [(key, state[key]) for key in keys if key not in self._fingerprints]
            self._fingerprints.update(fingerprints(new))
        for key in keys:
            del state[key]
        return {key: self._fingerprints[key] for key in keys} if describe else {}


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


def _parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)


def _prefixes(key: str) -> Iterable[str]:
    parts = key.split(".")
    return (".".join(parts[:length]) for length in range(len(parts), 0, -1))
