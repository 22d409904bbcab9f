"""Prompts without their padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignment_modules.policies.masks import check_unbroken


@dataclass(frozen=True)
class Prompts:
    """Prompts with their real tokens first.

    Attributes:
        ids: `[prompts, longest]` int64, right padded with 0.
        lengths: `[prompts]` int64, all > 0.
        limits: Most tokens of a completion of each prompt that has a limit of its own below that of the sampling
            parameters, None for one that has none; None: no prompt has one. `bounds` puts both together.
    """

    ids: Tensor
    lengths: Tensor
    limits: tuple[int | None, ...] | None = None

    @classmethod
    def from_padded(cls, prompt_ids: Tensor, prompt_mask: Tensor) -> Prompts:
        """Drops the padding of `[prompts, time]` ids, on whichever side it is.

        Raises:
            ValueError: If the shapes differ, there is no prompt, a prompt has no token or one is masked between others.
        """
        if prompt_ids.ndim != 2 or prompt_ids.shape != prompt_mask.shape:
            raise ValueError(
                "prompt_ids and prompt_mask must be [prompts, time] of one shape, got "
                f"{list(prompt_ids.shape)} and {list(prompt_mask.shape)}."
            )
        if prompt_ids.numel() == 0:
            raise ValueError(f"prompt_ids must hold at least one token, got shape {list(prompt_ids.shape)}.")
        mask = check_unbroken("prompt_mask", prompt_mask)
        lengths = mask.sum(1)
        if not bool(lengths.all()):
            empty = (lengths == 0).nonzero().flatten().tolist()
            raise ValueError(
                f"prompt_mask leaves no token in rows {empty}: a prompt needs at least one token, e.g. the "
                "beginning-of-sequence token."
            )
        longest = int(lengths.max())
        order = (~mask).byte().argsort(dim=1, stable=True)[:, :longest]
        real = torch.arange(longest, device=prompt_ids.device) < lengths[:, None]
        return cls(prompt_ids.gather(1, order).long().masked_fill(~real, 0), lengths)

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]], device: torch.device) -> Prompts:
        """Pads rows of token ids, none of them empty."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        return cls(ids.to(device), lengths.to(device))

    def limited(self, limits: Sequence[int | None] | None) -> Prompts:
        """The same prompts with limits; None: as they are.

        Args:
            limits: One a prompt, each at least 1; None for a prompt without.

        Raises:
            ValueError: If there is another number of them, or one is below 1.
        """
        if limits is None:
            return self
        if len(limits) != self.count or any(limit is not None and limit < 1 for limit in limits):
            raise ValueError(f"limits={list(limits)} must hold a number of at least 1 for each of {self.count} prompts")
        return replace(self, limits=tuple(limits))

    def bounds(self, longest: int) -> list[int] | None:
        """Most tokens of a completion of each prompt; None: no prompt has a limit of its own.

        Args:
            longest: What the sampling parameters allow.
        """
        if self.limits is None:
            return None
        return [longest if limit is None else min(limit, longest) for limit in self.limits]

    def reach(self, bounds: Sequence[int]) -> int:
        """Tokens of the longest prompt and completion together.

        Args:
            bounds: Most tokens of a completion of each prompt.
        """
        return max(length + bound for length, bound in zip(self.lengths.tolist(), bounds, strict=True))

    @property
    def count(self) -> int:
        """Number of prompts."""
        return self.ids.shape[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self.ids.shape[1]

    @property
    def mask(self) -> Tensor:
        """`[prompts, longest]` bool, True on tokens of the right-padded `ids`."""
        return torch.arange(self.longest, device=self.ids.device) < self.lengths[:, None]

    def left_padded(self, cached: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and positions `[prompts, longest]` with the padding in front.

        Args:
            cached: `[prompts]` tokens to leave out at each prompt's start; None: none.
        """
        new = self.lengths if cached is None else self.lengths - cached
        width = self.longest if cached is None else int(new.max())
        columns = torch.arange(width, device=self.ids.device) - (width - self.lengths[:, None])
        positions = columns.clamp(min=0)
        return self.ids.gather(1, positions), columns >= (self.lengths - new)[:, None], positions
