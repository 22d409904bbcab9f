"""What a paradigm hands to the base: a sum, the number of its units, and statistics that stay exact under any split.

A mean of means depends on how a batch was cut into micro-batches and ranks; a sum and a count do not. So every quantity
here travels as `(total, weight)` and is divided once, after everything was added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["mean", "std", "gap", "difference", "min", "max"]
Reduce = Callable[[Tensor, str], Tensor]


class Statistic(NamedTuple):
    """One number to log.

    Attributes:
        total: 0-dim tensor: the sum over the units (kind "mean") or the extreme value itself ("min", "max"); for their
            sample standard deviation ("std") [2], the sum of the units and that of their squares; for the mean size of
            sums that may cancel within a bin and not across ("gap") [bins], each bin's sum; for one
            mean less another ("difference") [2], the sum of either's units.
        weight: 0-dim tensor or number: how many units were summed ("difference": [2]); ignored for extremes.
        kind: How the values of micro-batches and ranks combine.
    """

    total: Tensor
    weight: Tensor | float = 1.0
    kind: Kind = "mean"


class Term(NamedTuple):
    """One sum of an objective, with the number of its units.

    Attributes:
        total: 0-dim tensor with a graph: the loss summed over its units (tokens, sequences or pairs).
        weight: 0-dim tensor: the number of units.
        coefficient: What the term's mean over the optimizer step is multiplied by.
    """

    total: Tensor
    weight: Tensor
    coefficient: float = 1.0

    @property
    def scaled(self) -> Tensor:
        """The total times the coefficient."""
        return self.total if self.coefficient == 1.0 else self.coefficient * self.total


@dataclass
class Objective:
    """The training objective of one micro-batch.

    The gradient of an optimizer step is that of `sum over terms of coefficient * sum(total) / sum(weight)`, with both
    sums over all micro-batches and ranks.

    Attributes:
        terms: Sums by name. Several have units of their own (tokens here, pairs there): such an objective is for an
            `UpdateModule` that counts the units of a step first (`units`).
        statistics: What to log, by name (without the "train/" prefix).
    """

    terms: dict[str, Term]
    statistics: dict[str, Statistic] = field(default_factory=dict)

    @classmethod
    def of(cls, total: Tensor, weight: Tensor, statistics: dict[str, Statistic] | None = None) -> Objective:
        """The usual case: one sum and the number of its units.

        Args:
            total: 0-dim tensor with a graph: the loss summed over its units.
            weight: 0-dim tensor: the number of units.
            statistics: What to log, by name.
        """
        return cls({"loss": Term(total, weight)}, {} if statistics is None else statistics)

    @property
    def total(self) -> Tensor:
        """The sum of the only term.

        Raises:
            ValueError: If there are several.
        """
        return self._only.scaled

    @property
    def weight(self) -> Tensor:
        """The number of units of the only term.

        Raises:
            ValueError: If there are several.
        """
        return self._only.weight

    @property
    def _only(self) -> Term:
        if len(self.terms) != 1:
            raise ValueError(
                f"the objective has the terms {', '.join(self.terms)}, each with a unit of its own, and no total: give "
                "their sums by name, and train them with an UpdateModule that defines units(piece)"
            )
        return next(iter(self.terms.values()))


class Meters:
    """Statistics added up on the device until they are asked for.

    Example:
        >>> meters = Meters()
        >>> meters.update({"loss": Statistic(torch.tensor(6.0), 2.0)})
        >>> meters.update({"loss": Statistic(torch.tensor(2.0), 6.0)})
        >>> meters.compute(lambda values, how: values)
        {'loss': 1.0}
    """

    def __init__(self) -> None:
        self._values: dict[tuple[Kind, str], Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    def update(self, statistics: Mapping[str, Statistic]) -> None:
        """Adds one micro-batch. Does not wait for the device."""
        for name, (total, weight, kind) in statistics.items():
            key = (kind, name)
            value = total.detach().double() if total.device.type != "mps" else total.detach().float()
            if kind in ("mean", "std", "gap", "difference"):
                value = value.reshape(-1)
                if not isinstance(weight, Tensor):
                    weight = value.new_full((), weight)
                sums = torch.cat([value, weight.to(value).reshape(-1)])
                self._values[key] = sums + self._values[key] if key in self._values else sums
            else:
                pick = torch.minimum if kind == "min" else torch.maximum
                self._values[key] = pick(value, self._values[key]) if key in self._values else value

    def compute(self, reduce: Reduce) -> dict[str, float]:
        """Combines the ranks and returns plain numbers; a mean without units and an extreme of nothing are left out.

        Args:
            reduce: `reduce(tensor, "sum" | "min" | "max")` over all ranks. It is called once a kind that is present, so
                all ranks must hold statistics of the same names.
        """
        results: dict[str, float] = {}
        devices = {value.device for value in self._values.values()}
        # Host-side numbers, such as rewards and times, join those of the accelerator.
        device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        kinds: tuple[Kind, ...] = ("mean", "std", "gap", "difference", "min", "max")
        for kind in kinds:
            how = kind if kind in ("min", "max") else "sum"
            names = sorted(name for held, name in self._values if held == kind)
            if not names:
                continue
            values = reduce(torch.stack([self._values[kind, name].to(device) for name in names]), how).tolist()
            for name, value in zip(names, values, strict=True):
                if kind == "std":
                    total, squares, count = value
                    if count > 0:  # of a single unit: 0
                        variance = max(squares - total * total / count, 0.0) / max(count - 1, 1)
                        results[name] = math.sqrt(variance)
                elif kind == "gap":
                    *sums, count = value
                    if count > 0:
                        results[name] = sum(map(abs, sums)) / count
                elif kind == "difference":
                    one, other, count, others = value
                    if count > 0 and others > 0:
                        results[name] = one / count - other / others
                elif kind != "mean":
                    if math.isfinite(value):
                        results[name] = value
                elif value[1] != 0:
                    results[name] = value[0] / value[1]
        return results

    def reset(self) -> None:
        """Forgets everything."""
        self._values.clear()

    def copy(self) -> Meters:
        """The same sums, which later updates of either leave alone."""
        other = Meters()
        other._values = dict(self._values)  # tensors are replaced, never changed
        return other

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The sums of this rank by kind and name, on the CPU."""
        state: dict[str, dict[str, Tensor]] = {}
        for (kind, name), value in self._values.items():
            state.setdefault(kind, {})[name] = value.cpu()
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> None:
        """Takes the place of everything held so far.

        Args:
            state: What `state_dict` gave.
            device: Where the sums go.
        """
        self._values = {(kind, name): value.to(device) for kind in state for name, value in state[kind].items()}  # type: ignore[misc]


class EarlyRead:
    """One number of the device, on its way to the host from now on.

    Reading it waits for what was queued before this object was made, and for nothing queued after: a count known after
    the forward pass can be read while the backward pass still runs.

    Args:
        value: 0-dim tensor, or a number.

    Example:
        >>> EarlyRead(torch.tensor(3.0)).item()
        3.0
    """

    def __init__(self, value: Tensor | float) -> None:
        self._event: torch.Event | None = None
        self._value = value
        if isinstance(value, Tensor) and value.device.type == "cuda":
            self._value = value.detach().to("cpu", non_blocking=True)
            self._event = torch.Event(value.device)
            self._event.record()

    def item(self) -> float:
        """The number."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def with_value(total: Tensor, value: Tensor) -> Tensor:
    """A scalar of another value than `total` with exactly its gradient.

    Args:
        total: 0-dim tensor, what is differentiated.
        value: 0-dim tensor, what is read.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> shown = with_value(10 * x, torch.tensor(1.5))
        >>> shown.backward()
        >>> shown.item(), x.grad.item()
        (1.5, 10.0)
    """
    return _WithValue.apply(total, value.detach())
