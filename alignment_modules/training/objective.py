"""What a paradigm hands to the base: sums, the numbers of their units, and statistics that stay exact under any split.

A mean of means depends on how a batch was cut into micro-batches and ranks; a sum and a count do not. So every quantity
here travels as `(total, weight)` and is divided once, after everything was added up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignment_modules.functional.statistics import Statistic


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
