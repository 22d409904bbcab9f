"""What truncated sampling kept at each step, collected while completions are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from alignment_modules.functional.support import Support


class KeptSets:
    """Gathers dense sets step by step, and makes a `Support` of them.

    Args:
        count: Completions.
        limit: Most tokens of one.
    """

    def __init__(self, count: int, limit: int) -> None:
        self._place = torch.full((count, limit), -1)  # of each token, where its set stands among all
        self._waiting: list[tuple[int, Tensor, Tensor]] = []
        self._parts = [Support.whole((0,))]
        self._count = 0

    def add(self, time: int, rows: Tensor, kept: Tensor) -> None:
        """Takes the sets of one step; does not wait for an accelerator.

        Args:
            time: The step.
            rows: `[rows]` int64, the completions that a token was drawn for.
            kept: `[rows, vocabulary]` bool, the tokens that it was drawn from.
        """
        self._waiting.append((time, rows, kept))

    def store(self) -> None:
        """Brings what was added to the host, in its small form; waits for an accelerator."""
        if not self._waiting:
            return
        for time, rows, _ in self._waiting:
            self._place[rows.cpu(), time] = self._count + torch.arange(len(rows))
            self._count += len(rows)
        self._parts.append(Support.from_mask(torch.cat([kept for _, _, kept in self._waiting])).to("cpu"))
        self._waiting = []

    def support(self, mask: Tensor) -> Support:
        """The sets of all tokens that there are, the whole vocabulary elsewhere.

        Args:
            mask: `[count, time]` bool on the host: the token exists.
        """
        self.store()
        return Support.cat(self._parts).take(self._place[:, : mask.shape[1]].masked_fill(~mask, -1))
