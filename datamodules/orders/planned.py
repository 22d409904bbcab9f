"""Batches of one plan for all epochs, filled with rows that are drawn anew among equal ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from datamodules.orders.base import Order, same_steps
from datamodules.orders.plans import Plan
from datamodules.ranges import Count, Seed, check_options


class PlannedOrder(Order):
    """The batches of a `Plan`: their sizes, and how long their rows may be, are those of every epoch.

    In each epoch the rows of a class change places at random, and the batches their order where `shuffle_batches` says
    so. Both depend on `(seed, epoch)` alone. Rows come twice only where a batch has fewer rows than there are ranks.

    Args:
        plan: The plan.
        batch_size: Rows of a batch of one rank; None: the plan's batches have several sizes.
        max_tokens: Most padded tokens of a batch of one rank; None: no budget.
        num_replicas: Number of data-parallel ranks.
        seed: Seed of what is drawn.
        shuffle_batches: Whether batches come in an order that is drawn for each epoch, not in that of the plan.
        curriculum: What batches are sorted by, in words; a state resumes with the same alone.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        batch_size: Count | None = None,
        max_tokens: Count | None = None,
        num_replicas: Count = 1,
        seed: Seed = 0,
        shuffle_batches: bool = True,
        curriculum: str | None = None,
    ) -> None:
        check_options(PlannedOrder.__init__, locals())
        super().__init__(len(plan.rows), num_replicas)
        self.plan, self.batch_size, self.max_tokens = plan, batch_size, max_tokens
        self.seed, self.shuffle_batches, self.curriculum = seed, shuffle_batches, curriculum

    def length(self, epoch: int) -> int:
        """The same in every epoch."""
        return len(self.plan.sizes)

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """The plan's batches with the rows of this epoch."""
        plan, generator = self.plan, np.random.default_rng([self.seed, epoch])
        rows = plan.rows[np.lexsort((generator.random(len(plan.rows)), plan.classes))]
        ends = np.cumsum(plan.sizes)
        count = len(plan.sizes)
        numbers = generator.permutation(count) if self.shuffle_batches else np.arange(count)
        for number in numbers[start:]:
            batch = rows[ends[number] - plan.sizes[number] : ends[number]]
            yield np.resize(batch, max(len(batch), self.num_replicas))

    def room(self, size: int) -> int | None:
        """How long a row of a global batch of `size` rows may be."""
        return None if self.max_tokens is None else self.max_tokens // -(-size // self.num_replicas)

    def settings(self) -> dict[str, Any]:
        """The options."""
        return super().settings() | {
            "batch_size": self.batch_size,
            "max_tokens": self.max_tokens,
            "shuffle": True,
            "seed": self.seed,
            "drop_last": False,
            "curriculum": self.curriculum,
        }

    def differences(self, then: Mapping[str, Any]) -> dict[str, Any]:
        """Without a budget another number of ranks may take a run up if their batches together have as many rows."""
        found = super().differences(then)
        if self.batch_size is not None and same_steps(then, self.settings()):
            return {name: value for name, value in found.items() if name not in ("world_size", "batch_size")}
        return found
