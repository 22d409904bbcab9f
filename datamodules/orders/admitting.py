"""Orders that admit a part of the rows, and give the places of the others to these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from datamodules.orders.base import Order


@dataclass(frozen=True)
class Pace:
    """How batches count as optimizer steps.

    Attributes:
        batches: Batches of an epoch.
        accumulate: Batches of an optimizer step; the last of an epoch may have fewer.
        updates: Optimizer steps that are taken with each.
    """

    batches: int
    accumulate: int = 1
    updates: int = 1

    def steps_before(self, epoch: int, batch: int) -> int:
        """Optimizer steps that were taken when a batch of an epoch is begun.

        >>> Pace(batches=5, accumulate=2).steps_before(1, 3)
        4
        """
        return (epoch * -(-self.batches // self.accumulate) + batch // self.accumulate) * self.updates


class AdmittingOrder(Order):
    """Another order's batches, in which rows that are not admitted give their places to some that are.

    So every admitted row comes as often as in the other order, and the places of the rest are shared out at random. A
    batch holds none of these twice: where too few are left, or too few that a budget of tokens has room for, the rest
    stays. What is drawn depends on `(seed, epoch, batch)` and on what is admitted.

    Args:
        order: The other order.
        lengths: Tokens of each row, int64 `[rows]`.
        seed: Seed of what is drawn.
        description: What is admitted, in words; a state resumes with the same alone.
    """

    def __init__(self, order: Order, lengths: np.ndarray, seed: int, description: str) -> None:
        super().__init__(order.rows, order.num_replicas)
        self.inner, self.lengths, self.seed, self.description = order, lengths, seed, description

    def admitted(self, epoch: int, batch: int) -> np.ndarray:
        """Which rows are, bool `[rows]`."""
        raise NotImplementedError

    def stays(self, rows: np.ndarray, admitted: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Which rows of a batch keep their places, bool `[rows of the batch]`."""
        return admitted[rows]

    def length(self, epoch: int) -> int:
        """That of the other order."""
        return self.inner.length(epoch)

    def room(self, size: int) -> int | None:
        """That of the other order."""
        return self.inner.room(size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """The other order's, with some rows replaced."""
        for number, rows in enumerate(self.inner.batches(epoch, start), start):
            yield self._filled(rows, epoch, number)

    def settings(self) -> dict[str, Any]:
        """Those of the other order, and the description."""
        return self.inner.settings() | {"curriculum": self.description}

    def differences(self, then: Mapping[str, Any]) -> dict[str, Any]:
        """What the other order says, and the description."""
        found, before = self.inner.differences(then), then.get("curriculum", self.description)
        found.pop("curriculum", None)
        return found | ({"curriculum": self.description} if before != self.description else {})

    def _filled(self, rows: np.ndarray, epoch: int, batch: int) -> np.ndarray:
        generator, admitted = np.random.default_rng([self.seed, epoch, batch, 2]), self.admitted(epoch, batch)
        leave = np.flatnonzero(~self.stays(rows, admitted, generator))
        if not len(leave):
            return rows
        free, room = admitted.copy(), self.room(len(rows))
        free[rows] = False
        if room is not None:
            free &= self.lengths <= room
        pool = np.flatnonzero(free)
        count, filled = min(len(pool), len(leave)), rows.copy()
        filled[generator.permutation(leave)[:count]] = generator.choice(pool, count, replace=False)
        return filled


class RampOrder(AdmittingOrder):
    """Admits the rows of lowest value, a share of all that grows with the optimizer steps up to all of them.

    Among rows of equal value it is drawn which come first, once for the whole run.

    Args:
        order: The order whose rows are admitted; once all are, its batches are given as they are.
        lengths: Tokens of each row, int64 `[rows]`.
        values: What rows are ranked by, float64 `[rows]`.
        start: Share that is admitted at first.
        steps: Optimizer steps after which all rows are.
        pace: How batches count as steps.
        seed: Seed of what is drawn.
        description: Of the values and the growth, in words.

    Raises:
        ValueError: If fewer rows are admitted at first than a batch of all ranks has.
    """

    def __init__(
        self,
        order: Order,
        lengths: np.ndarray,
        values: np.ndarray,
        *,
        start: float,
        steps: int,
        pace: Pace,
        seed: int,
        description: str,
    ) -> None:
        told = f"{description}, {pace.updates} steps in {pace.accumulate} batches"
        super().__init__(order, lengths, seed, told)
        ties = np.random.default_rng([seed, 3]).random(len(values))
        self.places = np.empty(len(values), dtype=np.int64)
        self.places[np.lexsort((ties, values))] = np.arange(len(values))
        self.start, self.steps, self.pace = start, steps, pace
        largest = order.settings()["batch_size"]
        fewest = min(order.rows, order.num_replicas * largest) if largest is not None else order.num_replicas
        if self._count(0) < fewest:
            raise ValueError(
                f"start={start} admits {self._count(0)} of {order.rows} rows, fewer than the {fewest} of a batch of "
                "all ranks; raise it"
            )

    def admitted(self, epoch: int, batch: int) -> np.ndarray:
        """The share's rows, of lowest value."""
        return self.places < self._count(self.pace.steps_before(epoch, batch))

    def record(self, rows: Sequence[int], scores: Sequence[float], epoch: int, batch: int) -> dict[str, float]:
        """Learns nothing; tells the share that is admitted."""
        return {"admitted": self._count(self.pace.steps_before(epoch, batch)) / max(self.rows, 1)}

    def _count(self, step: int) -> int:
        share = self.start + (1 - self.start) * min(step / self.steps, 1.0)
        return self.rows if step >= self.steps else int(np.ceil(share * self.rows - 1e-9))


class SuccessOrder(AdmittingOrder):
    """Sets rows aside whose running mean of scores is too low or too high; a row never judged is admitted.

    The mean of a row is `decay` times what it was, plus `1 - decay` times the mean of its new scores. A batch is drawn
    from what was recorded of the batches up to `ahead + 1` before it, since a loader's workers draw that many in
    advance: a state resumes exactly, and only with as many in advance or fewer.

    Args:
        order: The order whose rows are set aside.
        lengths: Tokens of each row, int64 `[rows]`.
        low: Least mean of a row that is kept.
        high: Greatest mean of a row that is kept.
        decay: Weight of what was, in [0, 1).
        revisit: Share of their places that rows set aside keep, so that they are judged again.
        seed: Seed of what is drawn.
        description: Of the options, in words.
    """

    def __init__(
        self,
        order: Order,
        lengths: np.ndarray,
        *,
        low: float,
        high: float,
        decay: float,
        revisit: float,
        seed: int,
        description: str,
    ) -> None:
        super().__init__(order, lengths, seed, description)
        self.low, self.high, self.decay, self.revisit = low, high, decay, revisit
        # Batches are numbered through all epochs. `_means` knows those before `_until`, `_drawn` those before `_seen`;
        # `_records` holds the rest, and what came after.
        self._means, self._until = np.full(self.rows, np.nan), 0
        self._drawn, self._seen = self._means.copy(), 0
        self._records: list[tuple[int, np.ndarray, np.ndarray]] = []

    def admitted(self, epoch: int, batch: int) -> np.ndarray:
        """Which rows are not set aside."""
        number = self._number(epoch, batch)
        self._advance(number - self.ahead)
        # The oldest batch that may be asked for again was under way when this one was drawn.
        self._forget(number - 2 * self.ahead - 2)
        return self._kept(self._drawn)

    def stays(self, rows: np.ndarray, admitted: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Admitted rows, and a share of the others."""
        return admitted[rows] | (generator.random(len(rows)) < self.revisit)

    def record(self, rows: Sequence[int], scores: Sequence[float], epoch: int, batch: int) -> dict[str, float]:
        """Takes the scores up; tells the share of rows set aside and the mean over all judged rows of their means."""
        number = self._number(epoch, batch)
        self._records.append((number, np.asarray(rows, dtype=np.int64), np.asarray(scores, dtype=np.float64)))
        means = self._drawn.copy()
        self._fold(means, self._seen, number + 1)
        judged = ~np.isnan(means)
        if not judged.any():
            return {}
        return {"set_aside": float(np.mean(~self._kept(means))), "mean_score": float(means[judged].mean())}

    def state_dict(self) -> dict[str, Any]:
        """Means, and what was recorded since, of plain numbers and tensors."""
        records = [[number, torch.from_numpy(rows), torch.from_numpy(scores)] for number, rows, scores in self._records]
        means = torch.from_numpy(self._means.copy())
        return {"ahead": self.ahead, "until": self._until, "means": means, "records": records}

    def load_state_dict(self, state: Mapping[str, Any], epoch: int, batch: int) -> None:
        """Goes on from a state; what was recorded of batches that come again is forgotten.

        Raises:
            ValueError: If more batches are drawn in advance than were.
        """
        if not state:
            return
        if self.ahead > state["ahead"]:
            raise ValueError(
                f"cannot resume the curriculum: its batches were drawn {state['ahead']} in advance when the checkpoint "
                f"was saved and are drawn {self.ahead} in advance now; resume with as many num_workers or fewer"
            )
        self.ahead, self._until = state["ahead"], state["until"]
        self._means = state["means"].numpy().astype(np.float64)
        self._drawn, self._seen = self._means.copy(), self._until
        now = self._number(epoch, batch)
        records = [(number, rows.numpy(), scores.numpy()) for number, rows, scores in state["records"]]
        self._records = [record for record in records if record[0] < now]

    def _number(self, epoch: int, batch: int) -> int:
        return epoch * self.length(epoch) + batch

    def _kept(self, means: np.ndarray) -> np.ndarray:
        return np.isnan(means) | ((means >= self.low) & (means <= self.high))

    def _advance(self, until: int) -> None:
        """Brings what is drawn from to all batches before `until`."""
        if until < self._seen:  # an epoch was begun anew
            self._drawn, self._seen = self._means.copy(), self._until
        self._fold(self._drawn, self._seen, until)
        self._seen = max(self._seen, until)

    def _forget(self, until: int) -> None:
        """Brings the oldest means that are kept to all batches before `until`, and drops what they hold then."""
        if until > self._until:
            self._fold(self._means, self._until, until)
            self._records = [record for record in self._records if record[0] >= until]
            self._until = until

    def _fold(self, means: np.ndarray, start: int, stop: int) -> None:
        for number, rows, scores in self._records:
            if start <= number < stop:
                found, places = np.unique(rows, return_inverse=True)
                new = np.bincount(places, weights=scores) / np.bincount(places)
                old = means[found]
                means[found] = np.where(np.isnan(old), new, self.decay * old + (1 - self.decay) * new)
