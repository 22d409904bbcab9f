"""The order of a mixture: rows of several sources, in every batch by their shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from datamodules.orders.shares import apportion
from datamodules.orders.uniform import UniformOrder
from datamodules.ranges import Count, Seed


class MixtureOrder(UniformOrder):
    """Global batches of a mixture's rows, an endless sequence of which each epoch is a stretch of one length.

    Every source is walked through pass after pass, each in an order of its own, and goes on across epochs where the
    last one left it. How many rows of it a batch has is `apportion`'s: after every batch each source has had its share
    of all rows so far to within one row. Where in the batch the sources' rows stand is drawn, so that every rank gets
    some of each. All of it depends on `(seed, epoch, batch)` alone. One source alone comes in the order of
    `UniformOrder`.

    Args:
        sizes: Rows of each source; row numbers run through the sources one after the other.
        shares: Whole numbers, the sources' shares of the rows.
        epoch_rows: Rows of an epoch.
        batch_size: Rows in a batch of one rank.
        num_replicas: Number of data-parallel ranks. A last batch that would leave one without a row is filled up with
            the epoch's first rows.
        shuffle: Draw the order of each pass; else each is in the order of the source.
        seed: Seed of what is drawn.
        drop_last: Leave out an epoch's last batch if it is not full.

    Raises:
        ValueError: If `drop_last` leaves nothing.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[int],
        epoch_rows: Count,
        *,
        batch_size: Count,
        num_replicas: Count = 1,
        shuffle: bool = True,
        seed: Seed = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            epoch_rows,
            batch_size=batch_size,
            num_replicas=num_replicas,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self.sizes, self.shares = list(sizes), list(shares)
        self._starts = np.concatenate(([0], np.cumsum(self.sizes)))[:-1]
        self._counts = (0, [0] * len(self.sizes))  # rows of each source before an epoch
        self._passes: dict[int, tuple[int, np.ndarray]] = {}  # the last pass of each source that was drawn

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Row numbers of each batch of an epoch, from batch `start` on, int64 `[rows]`."""
        counts, first = self._before(epoch), None
        for number, total in enumerate(self._totals(epoch)[: self.length(epoch)]):
            until = apportion(self.shares, counts, total)
            short = total - sum(counts) < self.num_replicas
            if number >= start or (first is None and self.num_replicas > 1):
                rows = self._rows(epoch, number, counts, until)
                first = rows if first is None else first
                if number >= start:
                    yield np.resize(np.concatenate((rows, first)), self.num_replicas) if short else rows
            counts = until

    def settings(self) -> dict[str, Any]:
        """Those of `UniformOrder`, for the rows of an epoch, and the sources' rows and shares."""
        return super().settings() | {"sizes": self.sizes, "shares": self.shares}

    def _totals(self, epoch: int) -> list[int]:
        """Rows since the start of training at the end of each batch of an epoch."""
        before = epoch * self.rows
        return [*range(before + self.step, before + self.rows, self.step), before + self.rows]

    def _before(self, epoch: int) -> list[int]:
        """Rows of each source in all epochs before this one."""
        total, whole = epoch * self.rows, sum(self.shares)
        exact = [divmod(total * share, whole) for share in self.shares]
        if not any(rest for _, rest in exact):
            return [count for count, _ in exact]
        known, counts = self._counts if self._counts[0] <= epoch else (0, [0] * len(self.sizes))
        for earlier in range(known, epoch):
            for total in self._totals(earlier):
                counts = apportion(self.shares, counts, total)
        self._counts = (epoch, counts)
        return counts

    def _rows(self, epoch: int, number: int, counts: Sequence[int], until: Sequence[int]) -> np.ndarray:
        """The rows that take the sources from some counts to others."""
        walked = [self._walk(n, *stretch) for n, stretch in enumerate(zip(counts, until, strict=True))]
        sources = np.repeat(np.arange(len(walked)), [len(rows) for rows in walked])
        drawn = np.random.default_rng([self.seed, epoch if self.shuffle else 0, number, 1])
        sources = sources[drawn.permutation(len(sources))]
        rows = np.empty(len(sources), dtype=np.int64)
        for source, own in enumerate(walked):
            rows[sources == source] = own
        return rows

    def _walk(self, source: int, start: int, stop: int) -> np.ndarray:
        """The rows of a source from its draw `start` to `stop`, counted since the start of training."""
        size, parts = self.sizes[source], [np.empty(0, dtype=np.int64)]
        while start < stop:
            number, place = divmod(start, size)
            part = self._pass(source, number)[place : place + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) + self._starts[source]

    def _pass(self, source: int, number: int) -> np.ndarray:
        """The order of a source's rows in one pass."""
        if not self.shuffle:
            return np.arange(self.sizes[source])
        if self._passes.get(source, (-1,))[0] != number:
            # The first source's seed is that of `UniformOrder`: numpy's seeds are as if followed by zeros.
            drawn = np.random.default_rng([self.seed, number, source]).permutation(self.sizes[source])
            self._passes[source] = (number, drawn)
        return self._passes[source][1]
