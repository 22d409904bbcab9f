"""Which order the training rows of a data module come in, and what its options ask of the rows."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.batching import Table
from datamodules.curricula import Batching, Curriculum
from datamodules.loader import ResumableLoader
from datamodules.orders import Order, UniformOrder
from datamodules.orders.admitting import Pace
from datamodules.orders.planned import PlannedOrder
from datamodules.orders.plans import bucketed
from datamodules.rows.rows import Rows
from datamodules.splits import Splits

if TYPE_CHECKING:
    from datamodules.base import AlignmentDataModule


class ScheduledRows:
    """What a data module does about the order of its training rows, and about scores that they are given."""

    curriculum: Curriculum | None
    splits: Splits
    training_loader: weakref.ref[ResumableLoader] | None
    """Weak: a loader that nobody uses any more is to end its workers at once, and not when the program does."""
    _scheduling: Scheduling | None

    @property
    def follows_scores(self) -> bool:
        """Whether `record` is to be called."""
        return self.curriculum is not None

    def record(self, index: Sequence[int], scores: Sequence[float]) -> dict[str, float]:
        """Takes up how well the training batch was done that was given last; all ranks call it with the same.

        Args:
            index: Row numbers of all ranks' rows, as in the batches' `index`.
            scores: One a number, in the unit of the rewards.

        Returns:
            What a curriculum tells of itself, by name.

        Raises:
            ValueError: If a number is none of a training row.
        """
        loader = None if self.training_loader is None else self.training_loader()
        if loader is None or self._scheduling is None:
            return {}
        return loader.record(self._scheduling.find(index), scores)

    def training_order(self, table: Table, replicas: int, shuffle: bool) -> Order:
        """Which rows make each batch of training.

        Args:
            table: The training rows.
            replicas: Number of data-parallel ranks.
            shuffle: Whether anything is drawn; else rows come in the order of the source.
        """
        return self.scheduled(table).order(replicas, shuffle)

    def forget_schedule(self) -> None:
        """Lets go of the training rows."""
        self._scheduling, self.training_loader = None, None

    def scheduled(self, table: Table) -> Scheduling:
        """The schedule of a table of training rows, which is made once.

        Raises:
            ValueError: As `Scheduling`.
        """
        if self._scheduling is None or self._scheduling.table is not table:
            data: Any = self
            self._scheduling = Scheduling(data, table, lambda: self.splits.rows("train"))
        return self._scheduling


def check_scheduling(data: AlignmentDataModule) -> None:
    """Checks that the options of a data module about the order of its rows fit each other.

    Raises:
        ValueError: If they do not.
    """
    curriculum, budget = data.curriculum, data.max_tokens
    if curriculum is not None and (not isinstance(curriculum, Curriculum) or type(curriculum) is Curriculum):
        raise ValueError(f"curriculum={curriculum!r} must be a Curriculum, such as ByColumn, ByLength or BySuccess")
    if not data.shuffle and (curriculum is not None or budget is not None):
        given = f"max_tokens={budget}" if curriculum is None else f"curriculum={curriculum}"
        raise ValueError(f"shuffle=False keeps the order of the source, and {given} has one of its own")
    if budget is not None and data.drop_last:
        raise ValueError(f"drop_last=True with max_tokens={budget}: batches have no one number of rows to be full of")
    if budget is not None and data.gives_prompts:
        raise ValueError(
            f"max_tokens={budget} counts tokens that are given; {type(data).__name__} gives prompts, whose completions "
            "are written later: set batch_size"
        )
    if curriculum is not None and curriculum.learns and not data.gives_prompts:
        raise ValueError(
            f"curriculum={curriculum} needs to be told rewards: it goes with PromptDataModule and a module that judges "
            "its own completions"
        )


def check_packing(data: AlignmentDataModule, packing: bool) -> None:
    """Refuses to rank packed rows.

    Raises:
        ValueError: If there is a curriculum, and rows are packed.
    """
    if packing and data.curriculum is not None:
        raise ValueError(
            f"packing=True puts several rows into one, and curriculum={data.curriculum} ranks rows: set packing=False"
        )


class Scheduling:
    """The order of the training rows of a data module whose table is made.

    Args:
        data: The data module, whose options count.
        table: Its training rows.
        rows: Opens their source.

    Raises:
        ValueError: If a row has more tokens than the budget, or cannot be ranked; the message names it.
    """

    def __init__(self, data: AlignmentDataModule, table: Table, rows: Callable[[], Rows]) -> None:
        self.data, self.table = data, table
        counted = data.max_tokens is not None or data.curriculum is not None
        self.lengths = table.lengths if counted else np.zeros(0, dtype=np.int64)
        self.values = None if data.curriculum is None else data.curriculum.values(table, rows)
        if data.max_tokens is not None:
            self._check_lengths(rows, data.max_tokens)

    def order(self, num_replicas: int, shuffle: bool) -> Order:
        """The order for so many ranks; that of the source where nothing is drawn, as under `overfit_batches`.

        Raises:
            ValueError: If the options do not fit the rows, or the module tells no scores that the curriculum needs.
        """
        data, curriculum = self.data, self.data.curriculum
        if data.max_tokens is None or not shuffle:
            plain: Order = self._uniform(num_replicas, shuffle)
        else:
            plan = bucketed(self.lengths, data.max_tokens, num_replicas)
            options: dict[str, Any] = {"max_tokens": data.max_tokens, "num_replicas": num_replicas, "seed": data.seed}
            plain = PlannedOrder(plan, **options)
        if curriculum is None or self.values is None or not shuffle:
            return plain
        self._check_module(curriculum)
        batching = Batching(data.batch_size, data.max_tokens, num_replicas, data.seed, data.drop_last)
        return curriculum.order(self.values, self.lengths, plain, batching, self._pace(plain))

    def find(self, index: Sequence[int]) -> list[int]:
        """Rows of the table by their numbers in the source.

        Raises:
            ValueError: If a number is none of a row.
        """
        known, numbers = self.table.source_rows, np.asarray(index, dtype=np.int64)
        places = np.searchsorted(known, numbers) if known is not None and len(known) else np.zeros_like(numbers)
        for number, place in zip(index, places.tolist(), strict=True):
            if known is None or place >= len(known) or known[place] != number:
                raise ValueError(f"index: {number} is the number of no training row")
        return places.tolist()

    def _uniform(self, num_replicas: int, shuffle: bool) -> UniformOrder:
        data = self.data
        options: dict[str, Any] = {"batch_size": data.batch_size, "seed": data.seed, "drop_last": data.drop_last}
        return UniformOrder(len(self.table), num_replicas=num_replicas, shuffle=shuffle, **options)

    def _pace(self, order: Order) -> Pace:
        """How batches count as optimizer steps under the Trainer; without one each is a step."""
        batches, trainer = order.length(0), self.data.trainer
        if trainer is None:
            return Pace(batches)
        limit: int | float = trainer.limit_train_batches or batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        updates = getattr(trainer.lightning_module, "optimizer_steps_per_batch", 1)
        return Pace(max(batches, 1), trainer.accumulate_grad_batches, updates)

    def _check_module(self, curriculum: Curriculum) -> None:
        """Refuses a curriculum that waits for scores which nobody tells."""
        trainer: Any = self.data.trainer
        if trainer is None or not curriculum.learns:
            return
        module = trainer.lightning_module
        if not getattr(module, "tells_scores", False):
            raise ValueError(
                f"curriculum={curriculum} needs to be told rewards, and {type(module).__name__} judges nothing; "
                "use ByColumn or ByLength"
            )
        if trainer.reload_dataloaders_every_n_epochs:
            raise ValueError(
                f"curriculum={curriculum} would forget what it learnt with Trainer(reload_dataloaders_every_n_epochs="
                f"{trainer.reload_dataloaders_every_n_epochs}); leave that out"
            )

    def _check_lengths(self, rows: Callable[[], Rows], max_tokens: int) -> None:
        worst = int(np.argmax(self.lengths)) if len(self.lengths) else 0
        if not len(self.lengths) or self.lengths[worst] <= max_tokens:
            return
        sources = self.table.source_rows
        place = f"packed row {worst}" if sources is None else rows().where(int(sources[worst]))
        raise ValueError(
            f"train: {place} has {int(self.lengths[worst])} tokens, max_tokens={max_tokens}; raise it, or lower "
            f"max_length={self.data.max_length}"
        )
