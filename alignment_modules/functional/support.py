"""The tokens that truncated sampling (top-k, top-p, min-p) drew from, position by position.

What a filter keeps depends on the policy as it was when it sampled, so it cannot be found out later: it is recorded,
and the log-softmax that scores the tokens is taken over it (DeepSeek-V3.2, arXiv:2512.02556, section 3.1, "keep
sampling mask").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

_WHOLE, _PACKED = 0, -1


@dataclass(frozen=True, eq=False)
class Support:
    """For each position a set of token ids, or the whole vocabulary.

    A set is kept as its ids or as one bit for each token of the vocabulary, whichever is smaller, so that a position
    takes at most an eighth of a byte for each token; the whole vocabulary takes nothing.

    Attributes:
        sizes: `[...]` int32, on the host: how many ids a position's set has; 0: the whole vocabulary; -1: the set is
            the next row of `bits`.
        ids: `[ids]` int32, ascending within each position, position after position.
        bits: `[sets, ceil(vocabulary / 8)]` uint8: bit `j` of byte `i` stands for the token `8 * i + j`.
    """

    sizes: Tensor
    ids: Tensor
    bits: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> Support:
        """The sets of a dense table, one a row.

        Args:
            mask: `[positions, vocabulary]` bool, True on the tokens of a set; none is empty.

        >>> Support.from_mask(torch.tensor([[True, False, True], [True, True, True]])).sizes.tolist()
        [-1, 0]
        """
        vocabulary = mask.shape[1]
        count = mask.sum(dim=1)
        width = -(-vocabulary // 8)
        packed = (4 * count > width) & (count < vocabulary)
        sizes = torch.where(packed, _PACKED, torch.where(count < vocabulary, count, _WHOLE)).to("cpu", torch.int32)
        listed = mask if bool((sizes > 0).all()) else mask[(sizes > 0).to(mask.device)]
        bits = F.pad(mask[packed], (0, 8 * width - vocabulary)).view(-1, width, 8)
        return cls(sizes, listed.nonzero()[:, 1].int(), (bits * _powers(mask.device)).sum(dim=-1, dtype=torch.uint8))

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Support:
        """Of positions that were all drawn from the whole vocabulary."""
        none = torch.zeros(0, dtype=torch.int32)
        return cls(torch.full(tuple(shape), _WHOLE, dtype=torch.int32), none, torch.zeros(0, 0, dtype=torch.uint8))

    @classmethod
    def cat(cls, parts: Sequence[Support]) -> Support:
        """The positions of at least one part, in order, as one row `[positions]`."""
        sizes, ids = (torch.cat([getattr(part, name).flatten() for part in parts]) for name in ("sizes", "ids"))
        return cls(sizes, ids, torch.cat([part.bits for part in parts if len(part.bits)] or [parts[0].bits]))

    @classmethod
    def stack(cls, parts: Sequence[Support]) -> Support:
        """Tables `[rows, time]` below each other, on the right padded to the widest with the whole vocabulary.

        Args:
            parts: At least one.
        """
        width, start, places = max(part.shape[1] for part in parts), 0, []
        for part in parts:
            place = start + torch.arange(part.sizes.numel()).view(part.shape)
            places.append(F.pad(place, (0, width - part.shape[1]), value=-1))
            start += part.sizes.numel()
        return cls.cat(parts).take(torch.cat(places))

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, on the host: `Support(**state)` is the same again."""
        return {"sizes": self.sizes, "ids": self.ids.cpu(), "bits": self.bits.cpu()}

    @property
    def shape(self) -> torch.Size:
        """Of the positions."""
        return self.sizes.shape

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, rows: slice | Tensor) -> Support:
        """Some rows, as of a tensor."""
        return self.take(torch.arange(self.sizes.numel()).view(self.shape)[rows])

    def take(self, positions: Tensor) -> Support:
        """The sets of some positions.

        Args:
            positions: `[...]` int64 on the host, counted over all positions in order; -1: the whole vocabulary.
        """
        flat = positions.flatten()
        known = F.pad(self.sizes.flatten(), (0, 1), value=_WHOLE)  # the last is what -1 refers to
        sizes = known[flat]
        counts, (first, set_number) = sizes.clamp(min=0), self._starts
        chosen, packed = flat[sizes > 0], flat[sizes == _PACKED]
        # Where each chosen id stands: its set's start, and how many of the set came before it.
        counts = counts[sizes > 0].long()
        before = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        index = first[chosen].repeat_interleave(counts) + before
        device = self.ids.device
        return Support(
            sizes.to(torch.int32).view(positions.shape),
            self.ids[index.to(device)],
            self.bits[set_number[packed].to(device)],
        )

    def to(self, device: torch.device | str) -> Support:
        """The same with the sets on another device."""
        return replace(self, ids=self.ids.to(device, non_blocking=True), bits=self.bits.to(device, non_blocking=True))

    def excluded(self, part: slice, vocabulary: int) -> Tensor:
        """The tokens outside the sets of some positions: `[positions, vocabulary]` bool, where the sets are.

        Args:
            part: Consecutive positions of one row `[positions]`.
            vocabulary: Tokens that there are.
        """
        device, sizes = self.ids.device, self.sizes[part]
        (first, set_number), counts = self._starts, sizes.clamp(min=0).long()
        start = int(first[part][0]) if len(sizes) else 0
        ids = self.ids[start : start + int(counts.sum())]
        result = (sizes != _WHOLE)[:, None].to(device, non_blocking=True).repeat(1, vocabulary)
        row = torch.arange(len(sizes)).repeat_interleave(counts).to(device, non_blocking=True)
        result[row, ids.long()] = False
        packed = (sizes == _PACKED).nonzero().squeeze(1)
        if len(packed):
            start = int(set_number[part][packed[0]])
            inside = self.bits[start : start + len(packed), :, None].bitwise_and(_powers(device)) != 0
            result.index_copy_(0, packed.to(device), ~inside.flatten(1)[:, :vocabulary])
        return result

    @cached_property
    def _starts(self) -> tuple[Tensor, Tensor]:
        """Of each position where its ids begin, and which row of `bits` is its own, both `[positions]` int64."""
        sizes = self.sizes.flatten()
        counts, packed = sizes.clamp(min=0).long(), (sizes == _PACKED).long()
        return counts.cumsum(0) - counts, packed.cumsum(0) - packed


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, device=device, dtype=torch.uint8)
