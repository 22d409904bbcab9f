"""What is told of a batch's rows, told of each source that they are from."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alignment_modules.functional.statistics import RowSums, Statistic

SOURCES = "source_name"
"""A batch's list of the names of the sources that its rows are from."""
PRESENT = ""
"""The name of a statistic that is there wherever rows have sources, also where there is no row; it is not logged."""


def by_source(sums: Mapping[str, RowSums], sources: Sequence[str] | None) -> dict[str, Statistic]:
    """Means over the rows of each source, by `source/name`; it does not wait for the device.

    Args:
        sums: Of R rows, or of R times as many beside each other (a prompt's completions), by name.
        sources: Where each of the R rows is from; None: rows have no sources, and nothing is told.

    Raises:
        ValueError: If a name's rows are no multiple of R.

    >>> told = by_source({"loss": RowSums(torch.tensor([1.0, 2.0, 6.0]), torch.ones(3))}, ["math", "code", "math"])
    >>> {name: float(told[name].total / told[name].weight) for name in ("code/loss", "math/loss")}
    {'code/loss': 2.0, 'math/loss': 3.5}
    """
    if sources is None:
        return {}
    found = {PRESENT: Statistic(torch.zeros(1), torch.zeros(1), "source")}
    names = sorted(set(sources))
    chosen = torch.tensor([[own == name for own in sources] for name in names])
    moved: dict[tuple[torch.device, int], Tensor] = {}
    for name, (totals, weights) in sums.items() if names else ():
        rows, device = totals.shape[-1], totals.device
        if rows % len(sources):
            raise ValueError(f"{name!r} is told of {rows} rows, and the batch has {len(sources)} with a source each")
        if (device, rows) not in moved:
            each = chosen.repeat_interleave(rows // len(sources), dim=1)
            moved[device, rows] = each.to(device, non_blocking=True)
        exact = torch.float32 if device.type == "mps" else torch.float64
        own = moved[device, rows].unflatten(0, (len(names), *[1] * (totals.dim() - 1)))
        # not a product: what is not a number in one source is none of the others' business
        parts = [torch.where(own, part.detach().to(exact), 0.0).sum(dim=-1) for part in (totals, weights)]
        for source, total, weight in zip(names, *parts, strict=True):
            found[f"{source}/{name}"] = Statistic(total, weight, "source")
    return found
