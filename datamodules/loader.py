"""A data loader that resumes exactly, in any epoch, with any number of workers, under data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, SequentialSampler, default_collate
from torch.utils.data.distributed import DistributedSampler

from datamodules.batching import Table
from datamodules.orders import Order


class ResumableSampler(DistributedSampler[int], SequentialSampler):
    """Deals each rank its rows of every batch of an order, starting at any batch.

    Yields lists of row numbers (use it with `batch_size=None`). Rank r takes every `num_replicas`-th row of a global
    batch from its r-th on, so the ranks' t-th batches together are the t-th batch of one process with as many rows.

    It is a `SequentialSampler` for Lightning alone, whose `overfit_batches` puts one, which knows no batches, in the
    place of any other sampler.

    Args:
        order: Which rows make each global batch; its `num_replicas` are the ranks.
        rank: This rank.
    """

    def __init__(self, order: Order, *, rank: int = 0) -> None:
        super().__init__(range(order.rows), num_replicas=order.num_replicas, rank=rank)  # type: ignore[arg-type]
        self.order = order
        self.start_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; a different epoch starts at its first batch."""
        if epoch != self.epoch:
            self.start_batch = 0
        self.epoch = epoch

    def __len__(self) -> int:
        return self.order.length(self.epoch)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.order.batches(self.epoch, self.start_batch):
            yield batch[self.rank :: self.num_replicas].tolist()


class EvaluationSampler(DistributedSampler[int], SequentialSampler):
    """Deals every row to exactly one rank, in the same number of batches on each, for metrics without repeated rows.

    Yields lists of row numbers (use it with `batch_size=None`). Batch sizes differ by at most one row. Only with fewer
    rows than ranks is a row repeated.

    Args:
        dataset: The data set, for its length alone.
        batch_size: Largest batch of one rank (exceeded by one where ranks could not get equally many batches else).
        num_replicas: Number of data-parallel ranks.
        rank: This rank.
    """

    def __init__(self, dataset: Any, *, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        rows = len(dataset)
        per_rank = -(-rows // (num_replicas * batch_size))
        if per_rank * num_replicas > rows:
            per_rank = max(1, rows // num_replicas)
        order = np.arange(max(rows, num_replicas)) % rows
        self._batches = np.array_split(order, per_rank * num_replicas)[rank::num_replicas]
        self.num_samples = len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter([batch.tolist() for batch in self._batches])


class Rows(Table):
    """Rows of any map-style dataset, one by one or as many as are asked for.

    Args:
        dataset: The dataset; its `fingerprint`, where it has one, is passed on.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.fingerprint = getattr(dataset, "fingerprint", "")

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> Any:
        """One row, as the dataset has it."""
        return self.dataset[index]


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over an order of rows whose `state_dict` says which batch comes next.

    The state holds counts, settings and what the order has learnt, equal on all ranks, so the one that rank 0 saves
    fits every rank. Lightning saves and restores it by itself. The loader draws nothing from the global random
    generator, and builds its iterator (and starts workers) at the first `next`, after the epoch has been set.

    Args:
        dataset: A map-style dataset.
        order: Which of its rows make each global batch.
        rank: This rank, of the order's `num_replicas`.
        **options: Keywords of `DataLoader`, but for those about batches and samplers.
    """

    sampler: ResumableSampler

    def __init__(self, dataset: Any, order: Order, *, rank: int = 0, **options: Any) -> None:
        rows = dataset if isinstance(dataset, Table) else Rows(dataset)
        options.setdefault("generator", torch.Generator())
        options.setdefault("collate_fn", default_collate)
        super().__init__(rows, batch_size=None, sampler=ResumableSampler(order, rank=rank), **options)
        order.ahead = self.num_workers * (self.prefetch_factor or 0)
        self._progress: tuple[int, int] | None = None
        # Says how many of the batches handed out are not yet done (an exception inside a step leaves one).
        self.in_flight: Callable[[], int] | None = None

    @property
    def order(self) -> Order:
        """Which rows make each global batch."""
        return self.sampler.order

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        sampler = self.sampler
        epoch, seen = sampler.epoch, sampler.start_batch
        self._progress = (epoch, seen)
        batches = super().__iter__()
        for number, batch in enumerate(batches, start=seen + 1):
            sampler.start_batch = 0  # consumed: a later iterator starts at the first batch
            self._progress = (epoch, number)
            yield batch
        sampler.start_batch = 0

    def record(self, rows: Sequence[int], scores: Sequence[float]) -> dict[str, float]:
        """Tells the order how well the batch was done that was handed out last; returns numbers to log, by name.

        Args:
            rows: Row numbers in the dataset, of all ranks.
            scores: One a row number.
        """
        epoch, number = self._progress or (self.sampler.epoch, 1)
        return self.order.record(rows, scores, epoch, number - 1)

    def state_dict(self) -> dict[str, Any]:
        """Position and settings, plain numbers and strings.

        Returns:
            `epoch` and `batches_seen` (batches of that epoch done by each rank), the settings that must be the same
            for the position to mean the same rows, and `order`, what it has learnt, where it learns.
        """
        epoch, seen = self.sampler.epoch, self.sampler.start_batch
        if self._progress is not None and self._progress[0] == epoch:
            seen = self._progress[1]
            if self.in_flight is not None:
                seen = max(0, seen - self.in_flight())
        learnt = self.order.state_dict()
        state = {"epoch": epoch, "batches_seen": seen, **self.order.settings(), "fingerprint": self._fingerprint}
        return {**state, "order": learnt} if learnt else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken: the next iterator starts at that epoch's next batch.

        Another number of ranks may take it up where the order says so: the rows of each step are then the same.

        Raises:
            ValueError: A setting differs from the one the state was saved with.
        """
        if not state:
            return
        if "positions" in state:
            raise ValueError(
                "cannot resume the training data: the checkpoint is of a run that read its training rows as a stream. "
                "Resume with stream, or start a new run from the exported weights"
            )
        other = self.order.differences(state)
        if state.get("fingerprint", self._fingerprint) != self._fingerprint:
            other["fingerprint"] = self._fingerprint
        if other:
            name, value = next(iter(other.items()))
            raise ValueError(
                f"cannot resume the training data: {name} was {state[name]!r} when the checkpoint was saved and is "
                f"{value!r} now. Resume with the same data, seed, batch size and number of processes (or with another "
                "number of processes whose batches together have as many rows), or start a new run from the exported "
                "weights"
            )
        epoch, seen = int(state["epoch"]), int(state["batches_seen"])
        self.order.load_state_dict(state.get("order", {}), epoch, seen)
        self.sampler.epoch, self.sampler.start_batch = epoch, seen
        self._progress = None

    @property
    def _fingerprint(self) -> str:
        return getattr(self.dataset, "fingerprint", "")
