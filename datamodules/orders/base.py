"""What an order is: the rows of each global batch of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class Order:
    """Says which rows make each global batch: the batch of all ranks together, of which rank r takes every R-th row.

    Everything that is drawn is a function of seed, epoch, number of the batch and recorded state, so that an epoch can
    be taken up at any of its batches. Every batch has at least one row for each rank.

    Attributes:
        rows: Rows of the table.
        num_replicas: Number of data-parallel ranks.
        ahead: Batches that the loader draws before the one that is trained on, for its workers. Set by the loader; an
            order that learns must not let what it learns of later batches depend on it.
    """

    ahead: int = 0

    def __init__(self, rows: int, num_replicas: int = 1) -> None:
        self.rows, self.num_replicas = rows, num_replicas

    def length(self, epoch: int) -> int:
        """Global batches of an epoch; Lightning takes the first epoch's for all."""
        raise NotImplementedError

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Row numbers of global batch `start` and all that follow it in an epoch, each int64 `[rows of the batch]`."""
        raise NotImplementedError

    def room(self, size: int) -> int | None:
        """How many tokens a row of a global batch of `size` rows may have; None: any number."""
        return None

    def settings(self) -> dict[str, Any]:
        """Plain values that must be the same for a position to mean the same rows."""
        return {"world_size": self.num_replicas, "num_rows": self.rows, "max_tokens": None, "curriculum": None}

    def differences(self, then: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, as they are now, that are others than `then` and forbid to resume; what is absent is no other.

        Args:
            then: The settings that a state was saved with.
        """
        return {name: value for name, value in self.settings().items() if then.get(name, value) != value}

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, of plain values and tensors; the same on all ranks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], epoch: int, batch: int) -> None:
        """Takes up what was learnt.

        Args:
            state: What `state_dict` gave.
            epoch: Where the run goes on.
            batch: The first batch of that epoch that is still to be done.
        """

    def record(self, rows: Sequence[int], scores: Sequence[float], epoch: int, batch: int) -> dict[str, float]:
        """Learns how well a global batch was done; all ranks tell the same.

        Args:
            rows: Row numbers in the table.
            scores: One a row number.
            epoch: Of the batch.
            batch: Its number in the epoch.

        Returns:
            Numbers to log, by name.
        """
        return {}


def same_steps(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the batches of all ranks together hold the same rows as before, dealt to another number of ranks.

    Args:
        then: Settings that a state was saved with.
        now: Settings of an order whose batches have `batch_size` rows a rank.
    """
    if then.get("batch_size") is None or "world_size" not in then:
        return False
    step = now["world_size"] * now["batch_size"]
    tail = 0 if now["drop_last"] else now["num_rows"] % step
    # a tail of fewer rows than ranks is filled up with rows that come twice
    alike = tail == 0 or tail >= max(then["world_size"], now["world_size"])
    return alike and then["world_size"] * then["batch_size"] == step
