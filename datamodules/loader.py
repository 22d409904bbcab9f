"""A data loader that resumes exactly, in any epoch, with any number of workers, under data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler


class ResumableSampler(DistributedSampler[int]):
    """Gives each rank its rows of an epoch, starting at any batch.

    The order of an epoch depends on `(seed, epoch)` alone. Rank r takes every `num_replicas`-th row from r on, so the
    ranks' t-th batches together are the t-th batch of one process with `num_replicas * batch_size` rows. Rows are
    repeated only where the last global batch would leave a rank without any (fewer rows than ranks).

    Args:
        dataset: The data set, for its length alone.
        batch_size: Rows in a batch of one rank.
        num_replicas: Number of data-parallel ranks.
        rank: This rank.
        shuffle: Draw a new order each epoch.
        seed: Seed of the orders.
        drop_last: Leave out the last global batch if it is not full.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        rows, step = len(dataset), num_replicas * batch_size
        tail = rows % step
        if drop_last and rows < step:
            raise ValueError(
                f"drop_last=True leaves nothing: {rows} rows, and one batch of all ranks takes {step} "
                f"(batch_size={batch_size} x {num_replicas} ranks)"
            )
        if drop_last:
            self.total_size = rows - tail
        else:
            self.total_size = rows + (num_replicas - tail if 0 < tail < num_replicas else 0)
        self.num_samples = len(range(rank, self.total_size, num_replicas))
        self.batch_size = batch_size
        self.start_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; a different epoch starts at its first batch."""
        if epoch != self.epoch:
            self.start_batch = 0
        self.epoch = epoch

    def order(self) -> np.ndarray:
        """Row numbers of this epoch for all ranks, int64 `[total_size]`."""
        rows = len(self.dataset)  # type: ignore[arg-type]
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(rows) if self.shuffle else np.arange(rows)
        return np.resize(order, self.total_size)

    def __iter__(self) -> Iterator[int]:
        own = self.order()[self.rank :: self.num_replicas]
        return iter(own[self.start_batch * self.batch_size :].tolist())


class EvaluationSampler(DistributedSampler[int]):
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


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over a `ResumableSampler` whose `state_dict` says which batch comes next.

    The state holds counts and settings only, equal on all ranks, so the one that rank 0 saves fits every rank.
    Lightning saves and restores it by itself. The loader draws nothing from the global random generator, and builds its
    iterator (and starts workers) at the first `next`, after the epoch has been set.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(*args, **kwargs)
        self._progress: tuple[int, int] | None = None
        # Says how many of the batches handed out are not yet done (an exception inside a step leaves one).
        self.in_flight: Callable[[], int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler):  # replaced from outside, as `overfit_batches` does
            yield from super().__iter__()
            return
        epoch, seen = sampler.epoch, sampler.start_batch
        self._progress = (epoch, seen)
        batches = super().__iter__()
        for number, batch in enumerate(batches, start=seen + 1):
            sampler.start_batch = 0  # consumed: a later iterator starts at the first batch
            self._progress = (epoch, number)
            yield batch
        sampler.start_batch = 0

    def _settings(self) -> dict[str, Any]:
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler):
            return {}
        return {
            "world_size": sampler.num_replicas,
            "batch_size": sampler.batch_size,
            "num_rows": len(self.dataset),  # type: ignore[arg-type]
            "shuffle": sampler.shuffle,
            "seed": sampler.seed,
            "drop_last": sampler.drop_last,
            "fingerprint": getattr(self.dataset, "fingerprint", ""),
        }

    def state_dict(self) -> dict[str, Any]:
        """Position and settings, plain numbers and strings.

        Returns:
            `epoch` and `batches_seen` (batches of that epoch done by each rank), and the settings that must be the
            same for the position to mean the same rows.
        """
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler):
            return {}
        epoch, seen = sampler.epoch, sampler.start_batch
        if self._progress is not None and self._progress[0] == epoch:
            seen = self._progress[1]
            if self.in_flight is not None:
                seen = max(0, seen - self.in_flight())
        return {"epoch": epoch, "batches_seen": seen, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken: the next iterator starts at that epoch's next batch.

        Another number of ranks may take it up if their batches together have as many rows: the rows of each step are
        then the same.

        Raises:
            ValueError: A setting differs from the one the state was saved with.
        """
        sampler = self.sampler
        if not state or not isinstance(sampler, ResumableSampler):
            return
        now = self._settings()
        other = {name: value for name, value in now.items() if state.get(name, value) != value}
        if _same_batches(state, now):
            other = {name: value for name, value in other.items() if name not in ("world_size", "batch_size")}
        if other:
            name, value = next(iter(other.items()))
            raise ValueError(
                f"cannot resume the training data: {name} was {state[name]!r} when the checkpoint was saved and is "
                f"{value!r} now. Resume with the same data, seed, batch size and number of processes (or with another "
                "number of processes whose batches together have as many rows), or start a new run from the exported "
                "weights"
            )
        sampler.epoch, sampler.start_batch = int(state["epoch"]), int(state["batches_seen"])
        self._progress = None


def _same_batches(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the batches of all ranks together hold the same rows as before, dealt to another number of ranks."""
    if not {"world_size", "batch_size"} <= then.keys():
        return False
    step = now["world_size"] * now["batch_size"]
    tail = 0 if now["drop_last"] else now["num_rows"] % step
    # a tail of fewer rows than ranks is filled up with rows that come twice
    alike = tail == 0 or tail >= max(then["world_size"], now["world_size"])
    return alike and then["world_size"] * then["batch_size"] == step
