"""Where the rows of a rollout live while they share their prompts' keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bins:
    """Rows in bins of equal size, each bin holding samples of one prompt.

    Attributes:
        count: Number of bins.
        size: Places in a bin.
        prompt: `[bins]` prompt of each bin.
        row_of_place: `[bins * size]` row in each place; empty places repeat row 0. None when place `i` is row `i`.
        place_of_row: `[rows]` place of each row, or None likewise.
    """

    count: int
    size: int
    prompt: Tensor
    row_of_place: Tensor | None
    place_of_row: Tensor | None

    @property
    def places(self) -> int:
        """Places in all bins."""
        return self.count * self.size

    @classmethod
    def pack(cls, prompt_of_row: Tensor, share: float) -> Bins:
        """Packs rows, sorted by prompt, at the least cost.

        Few large bins leave places empty, which still cost arithmetic; many small ones hold a prompt more than once.

        Args:
            prompt_of_row: `[rows]` int64 on the CPU, ascending.
            share: Cost of a bin relative to a place.
        """
        prompts, counts = prompt_of_row.unique_consecutive(return_counts=True)
        size = bin_size(counts.tolist(), share)
        bins = -(-counts // size)
        first_bin = (bins.cumsum(0) - bins).repeat_interleave(counts)
        rank = torch.arange(len(prompt_of_row)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        place = first_bin * size + rank
        count = int(bins.sum())
        row = torch.zeros(count * size, dtype=torch.int64)
        row[place] = torch.arange(len(place))
        full = len(place) == len(row)
        return cls(count, size, prompts.repeat_interleave(bins), None if full else row, None if full else place)


def bin_size(counts: Sequence[int], share: float) -> int:
    """The bin size that costs least when a place costs 1 and a bin `share`; the largest among equals.

    >>> bin_size([8, 8], 0.5), bin_size([5, 3, 4, 4], 0.1), bin_size([5, 3, 4, 4], 1.0)
    (8, 1, 5)
    """
    best, cheapest = 1, float("inf")
    for size in range(1, max(counts) + 1):
        cost = sum(-(-count // size) for count in counts) * (size + share)
        if cost <= cheapest:
            best, cheapest = size, cost
    return best
