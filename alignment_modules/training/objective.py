"""What a paradigm hands to the base: sums, the numbers of their units, and statistics that stay exact under any split.

A mean of means depends on how a batch was cut into micro-batches and ranks; a sum and a count do not. So every quantity
here travels as `(total, weight)` and is divided once, after everything was added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignment_modules.functional.statistics import RowSums, Statistic


class Term(NamedTuple):
    """One sum of an objective, with the number of its units.

    Attributes:
        total: 0-dim tensor with a graph: the loss summed over its units (tokens, sequences or pairs).
        weight: 0-dim tensor: the number of units.
        coefficient: What the term's mean over the optimizer step is multiplied by.
        rows: What each row of the batch adds to both; None: that is not known.
    """

    total: Tensor
    weight: Tensor
    coefficient: float = 1.0
    rows: RowSums | None = None

    @classmethod
    def of_rows(cls, totals: Tensor, weights: Tensor, coefficient: float = 1.0) -> Term:
        """The sum over the rows of a batch: [rows] with a graph, and the numbers of their units, [rows]."""
        return cls(totals.sum(), weights.sum(), coefficient, RowSums(totals, weights))

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
        rows: Of what is told of each source by itself, beside the loss, what each row of the batch adds.
        name: Under which name of the statistics its value is logged.
    """

    terms: dict[str, Term]
    statistics: dict[str, Statistic] = field(default_factory=dict)
    rows: dict[str, RowSums] = field(default_factory=dict)
    name: str = "loss"

    @classmethod
    def of(cls, total: Tensor, weight: Tensor, statistics: dict[str, Statistic] | None = None) -> Objective:
        """The usual case: one sum and the number of its units.

        Args:
            total: 0-dim tensor with a graph: the loss summed over its units.
            weight: 0-dim tensor: the number of units.
            statistics: What to log, by name.
        """
        return cls({"loss": Term(total, weight)}, {} if statistics is None else statistics)

    @classmethod
    def of_rows(
        cls,
        totals: Tensor,
        weights: Tensor,
        statistics: Mapping[str, Statistic] | None = None,
        rows: Mapping[str, RowSums] | None = None,
        *,
        name: str = "loss",
    ) -> Objective:
        """One sum over the rows of a batch, so that rows may have weights, and their sources are told apart.

        Args:
            totals: [rows] with a graph: each row's loss summed over its units.
            weights: [rows]: how many units it has.
            statistics: What to log, by name, beside its value.
            rows: What to log of the rows' sources, too.
            name: Under which name its value is logged.
        """
        term, sums = Term.of_rows(totals, weights), dict(rows or {})
        told = {name: Statistic(term.total, term.weight)} | {key: one.mean for key, one in sums.items()}
        return cls({"loss": term}, told | dict(statistics or {}), sums, name)

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
