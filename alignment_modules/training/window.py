"""What one optimizer step has accumulated, and what its gradients are divided by."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from alignment_modules.training.meters import Reduce
from alignment_modules.training.objective import EarlyRead, Objective

TINY = 1e-30  # instead of 0 as the weight of nothing


class Closed(NamedTuple):
    """An optimizer step, over all its micro-batches and ranks.

    Attributes:
        loss: 0-dim float32: the objective's value, `sum(total) / sum(weight)`.
        divisor: 0-dim float32, or 1.0: what the accumulated gradients are to be divided by.
        empty: Whether nothing was weighed at all, so that the step must move nothing.
    """

    loss: Tensor
    divisor: Tensor | float
    empty: bool


class Window:
    """Counts for one optimizer: micro-batches are added, and the step closed.

    An objective with one unit is backpropagated as the sum it is, and the gradients divided once, at the end, by the
    weight of all micro-batches and ranks. One with several units cannot be divided so: its units are counted first
    (`open`), and each total divided before its backward pass.

    Attributes:
        tokens: What the open step has read on this rank, for `num_tokens`.
        num_tokens: Tokens of all closed steps and all ranks.
        skipped: How many steps had nothing to learn from.
        learnt: Whether a step since this was last set to None moved anything; None: there was no step.

    Example:
        >>> window = Window()
        >>> _ = window.add(Objective.of(torch.tensor(6.0), torch.tensor(2.0)))
        >>> _ = window.add(Objective.of(torch.tensor(2.0), torch.tensor(6.0)))
        >>> closed = window.close(lambda values, how: values)
        >>> closed.loss.item(), closed.divisor.item(), closed.empty
        (1.0, 8.0, False)
    """

    def __init__(self) -> None:
        self.num_tokens: Tensor | float = 0.0
        self.skipped = 0
        self.learnt: bool | None = True  # an epoch that is resumed in its middle is not judged
        self.reset()

    def reset(self) -> None:
        """Forgets a step that was not closed; what was counted of closed ones stays."""
        self.tokens: Tensor | float = 0.0
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  # total and weight of each term
        self._units: dict[str, Tensor] | None = None
        self._early: EarlyRead | None = None

    def open(self, units: Mapping[str, Tensor] | None) -> None:
        """Begins a step.

        Args:
            units: The weight of each term over all micro-batches and ranks, 0-dim; None: one unit, counted on the way.
        """
        self._units = None if units is None else dict(units)

    def add(self, objective: Objective) -> Tensor:
        """Adds a micro-batch. Does not wait for the device.

        Returns:
            What is to be backpropagated: the total, or the sum of the totals each divided by its units.

        Raises:
            ValueError: If the objective has several terms and their units were not counted, or has other terms than
                were counted or than the micro-batch before.
        """
        terms, units = objective.terms, self._units
        if units is None and len(terms) != 1:
            raise ValueError(
                f"the objective has the terms {', '.join(terms)}, each with a unit of its own, and their units were "
                "not counted before the first backward pass: define units(piece) on an UpdateModule"
            )
        expected = self._sums if units is None else units
        if expected and terms.keys() != expected.keys():
            raise ValueError(f"the objective has the terms {', '.join(terms)}; expected are {', '.join(expected)}")
        loss: Tensor | float = 0.0
        for name, term in terms.items():
            total = term.scaled
            before, weighed = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before + total.detach(), weighed + term.weight.detach())
            loss = total if units is None else loss + total / units[name].clamp(min=TINY)
        first, *others = (weight for _, weight in self._sums.values())
        self._early = EarlyRead(sum(others, start=first))
        return torch.as_tensor(loss)

    def close(self, reduce: Reduce, device: torch.device | str = "cpu") -> Closed:
        """Ends the step: adds up micro-batches and ranks, and is ready for the next one.

        Args:
            reduce: `reduce(tensor, "sum")` over all ranks.
            device: Where the sums are added up.

        Raises:
            ValueError: If the units that were counted at the start are not those of the objective.
        """
        counts = [self.tokens, *(value for pair in self._sums.values() for value in pair)]
        summed = reduce(torch.stack([torch.as_tensor(c, device=device, dtype=torch.float32) for c in counts]), "sum")
        names, units, early = list(self._sums), self._units, self._early
        self.num_tokens = self.num_tokens + summed[0]
        self.reset()
        totals, weights = summed[1::2], summed[2::2]
        if units is None:
            divisor = weights.sum()
            loss = totals.sum() / divisor
        else:
            counted = torch.stack([units[name] for name in names]).to(weights)
            if not torch.allclose(counted, weights, rtol=1e-4, atol=1e-4):
                pairs = zip(names, counted.tolist(), weights.tolist(), strict=True)
                found = ", ".join(f"{name}: {before:g} and then {weight:g}" for name, before, weight in pairs)
                raise ValueError(f"units() counted other weights than the objective gave over the step ({found})")
            divisor, loss = torch.ones_like(weights[0]), (totals / weights.clamp(min=TINY)).sum()
        # What this rank added up is known before its backward pass ends; only where it is nothing, all ranks' counts.
        empty = not (early and early.item()) and not float(weights.sum())
        self.learnt = bool(self.learnt) or not empty
        self.skipped += empty
        return Closed(loss, divisor.clamp(min=TINY), empty)
