"""What an optimizer is given: a module's trainable parameters, in groups with names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from torch import nn

_NORM_TYPES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # those of batches have one dimension


class ParameterGroups(list[dict[str, Any]]):
    """Parameter groups, for any optimizer, that also know which of their parameters are hidden matrices.

    Args:
        groups: Dictionaries as a torch optimizer takes them.
        matrices: The hidden matrices among their parameters (see `hidden_matrices`).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], matrices: Iterable[nn.Parameter]) -> None:
        super().__init__(groups)
        self.matrices = frozenset(map(id, matrices))

    def split(self, name: str) -> list[dict[str, Any]]:
        """The groups with their hidden matrices in groups of their own, which come first.

        Args:
            name: What the matrices' group is called. There are several where several groups hold some.
        """
        parts: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        for group in self:
            inside = [p for p in group["params"] if id(p) in self.matrices]
            outside = [p for p in group["params"] if id(p) not in self.matrices]
            parts += [{**group, "params": inside, "name": name}] if inside else []
            rest += [{**group, "params": outside}] if outside else []
        return parts + rest


def parameter_groups(module: nn.Module) -> ParameterGroups:
    """Splits the trainable parameters into one group that decays and one that does not.

    Norms, biases and every parameter with at most one dimension get `weight_decay = 0`; the others take the optimizer's
    own default. Shared parameters appear once. The order is that of `module.named_parameters()`.

    Args:
        module: Whatever is trained. Parameters with `requires_grad=False` are left out.

    Returns:
        One or two parameter groups, named "decay" and "no_decay"; a group without parameters is left out.

    Raises:
        ValueError: If nothing in `module` is trainable.

    Examples:
        >>> groups = parameter_groups(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
        >>> [(group["name"], len(group["params"])) for group in groups]
        [('decay', 1), ('no_decay', 3)]
    """
    no_decay_ids: set[int] = set()
    for child in module.modules():
        if isinstance(child, _NORM_TYPES) or type(child).__name__.endswith("Norm"):
            no_decay_ids.update(id(parameter) for parameter in child.parameters(recurse=False))
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.rpartition(".")[2].endswith("bias")
        exempt = is_bias or parameter.ndim <= 1 or id(parameter) in no_decay_ids
        (no_decay if exempt else decay).append(parameter)
    groups: list[dict[str, Any]] = []
    if decay:
        groups.append({"params": decay, "name": "decay"})
    if no_decay:
        groups.append({"params": no_decay, "name": "no_decay", "weight_decay": 0.0})
    if not groups:
        raise ValueError(f"module={type(module).__name__} has no trainable parameter: every requires_grad is False")
    return ParameterGroups(groups, hidden_matrices(module, among=decay))


def hidden_matrices(module: nn.Module, among: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The matrices that map hidden states to hidden states.

    Embeddings and the head are none, whole or as adapters, nor is a matrix of one row or column, such as a scalar head.
    A transformers model says itself which its ends are. In any other module the head is a linear layer with as many
    outputs as the largest embedding has rows.

    Args:
        module: What holds them.
        among: Parameters of it.
    """
    ends: set[int] = set()
    rows, told = 0, False
    for child in module.modules():
        if isinstance(child, nn.Embedding) or type(child).__name__.endswith("Embedding"):  # peft's around one
            ends.update(map(id, child.parameters()))
            rows = max(rows, getattr(child, "num_embeddings", 0))
        for find in ("get_input_embeddings", "get_output_embeddings"):
            if hasattr(child, find):
                told = True
                with contextlib.suppress(NotImplementedError):
                    end = getattr(child, find)()
                    ends.update(() if end is None else map(id, end.parameters()))
    for child in () if told else module.modules():
        if isinstance(child, nn.Linear) and child.out_features == rows:
            ends.update(map(id, child.parameters()))
    return [p for p in among if p.ndim == 2 and min(p.shape) > 1 and id(p) not in ends]
