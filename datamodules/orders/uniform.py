"""All rows once an epoch, in an order that is drawn anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from datamodules.orders.base import Order, same_steps
from datamodules.ranges import Count, Natural, Seed, check_options


class UniformOrder(Order):
    """Every row once an epoch, in batches of one size.

    The order of an epoch depends on `(seed, epoch)` alone. Rows are repeated only where the last global batch would
    leave a rank without any (fewer rows than ranks).

    Args:
        rows: Rows of the table.
        batch_size: Rows in a batch of one rank.
        num_replicas: Number of data-parallel ranks.
        shuffle: Draw a new order each epoch.
        seed: Seed of the orders.
        drop_last: Leave out the last global batch if it is not full.

    Raises:
        ValueError: If `drop_last` leaves nothing.
    """

    def __init__(
        self,
        rows: Natural,
        *,
        batch_size: Count,
        num_replicas: Count = 1,
        shuffle: bool = True,
        seed: Seed = 0,
        drop_last: bool = False,
    ) -> None:
        check_options(UniformOrder.__init__, locals())
        super().__init__(rows, num_replicas)
        self.batch_size, self.shuffle, self.seed, self.drop_last = batch_size, shuffle, seed, drop_last
        self.step = num_replicas * batch_size
        tail = rows % self.step
        if drop_last and rows < self.step:
            raise ValueError(
                f"drop_last=True leaves nothing: {rows} rows, and one batch of all ranks takes {self.step} "
                f"(batch_size={batch_size} x {num_replicas} ranks)"
            )
        filled = num_replicas - tail if 0 < tail < num_replicas else 0
        self._dealt = rows - tail if drop_last else rows + filled

    def length(self, epoch: int) -> int:
        """The same in every epoch."""
        return -(-self._dealt // self.step)

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Slices of a permutation of all rows."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.rows) if self.shuffle else np.arange(self.rows)
        order = np.resize(order, self._dealt)
        for first in range(start * self.step, self._dealt, self.step):
            yield order[first : first + self.step]

    def settings(self) -> dict[str, Any]:
        """The options."""
        return super().settings() | {
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }

    def differences(self, then: Mapping[str, Any]) -> dict[str, Any]:
        """Another number of ranks may take a run up if their batches together have as many rows."""
        found = super().differences(then)
        if same_steps(then, self.settings()):
            return {name: value for name, value in found.items() if name not in ("world_size", "batch_size")}
        return found
