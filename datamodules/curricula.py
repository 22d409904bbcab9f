"""Curricula: in which order the rows of training come, or which of them are admitted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from datamodules.batching import Table
from datamodules.orders import Order
from datamodules.orders.admitting import Pace, RampOrder, SuccessOrder
from datamodules.orders.planned import PlannedOrder
from datamodules.orders.plans import ascending
from datamodules.ranges import Count, Finite, Range, check_options
from datamodules.rows.messages import scalar, short
from datamodules.rows.rows import Rows

__all__ = ["ByColumn", "ByLength", "BySuccess"]


@dataclass(frozen=True)
class Batching:
    """How a data module makes batches of its training rows.

    Attributes:
        batch_size: Rows of a batch of one rank.
        max_tokens: Most padded tokens of one; None: no budget.
        num_replicas: Number of data-parallel ranks.
        seed: Seed of what is drawn.
        drop_last: Leave out a last batch that is not full.
    """

    batch_size: int
    max_tokens: int | None
    num_replicas: int
    seed: int
    drop_last: bool


class Curriculum:
    """Base of the curricula; use one of its subclasses."""

    learns: ClassVar[bool] = False
    """Whether it needs to be told scores."""

    def values(self, table: Table, rows: Callable[[], Rows]) -> np.ndarray:
        """What the rows of a table are ranked by, float64 `[rows]`; zeros where that is learnt.

        Args:
            table: The table.
            rows: Opens its source.

        Raises:
            ValueError: A row cannot be ranked; the message names it.
        """
        return np.zeros(len(table))

    def order(self, values: np.ndarray, lengths: np.ndarray, plain: Order, batching: Batching, pace: Pace) -> Order:
        """The order of training rows.

        Args:
            values: What `values` gave.
            lengths: Tokens of each row, int64 `[rows]`.
            plain: The order without a curriculum.
            batching: What it was made of.
            pace: How batches count as optimizer steps.

        Raises:
            ValueError: The options do not fit the rows.
        """
        raise NotImplementedError


class _Graded(Curriculum):
    """Ranks rows by a number of each: they come sorted, or are admitted by and by."""

    def __init__(self, mode: str, start: float | None, steps: int | None, descending: bool) -> None:
        if mode == "admission" and steps is None:
            raise ValueError("steps=None with mode='admission': give the optimizer steps after which all are admitted")
        for name, value in {"start": start, "steps": steps}.items():
            if mode == "sorted" and value is not None:
                raise ValueError(f"{name}={value} has no effect with mode='sorted'; leave it out, or set 'admission'")
        self.mode, self.steps, self.descending = mode, steps, descending
        self.start = 0.25 if start is None else start

    def order(self, values: np.ndarray, lengths: np.ndarray, plain: Order, batching: Batching, pace: Pace) -> Order:
        """Sorted batches, or the plain ones with what is admitted."""
        if self.mode == "sorted" and batching.drop_last:
            raise ValueError(f"drop_last=True with curriculum={self}: each epoch would leave out its last rows")
        values = -values if self.descending else values
        if self.mode == "admission":
            options: Any = {"start": self.start, "steps": self.steps, "pace": pace, "seed": batching.seed}
            return RampOrder(plain, lengths, values, **options, description=str(self))
        budget, replicas = batching.max_tokens, batching.num_replicas
        return PlannedOrder(
            ascending(values, lengths, budget, batching.batch_size, replicas),
            batch_size=batching.batch_size if budget is None else None,
            max_tokens=budget,
            num_replicas=replicas,
            seed=batching.seed,
            shuffle_batches=False,
            curriculum=str(self),
        )

    def _told(self) -> str:
        growth = f", start={self.start}, steps={self.steps}" if self.mode == "admission" else ""
        return f"mode={self.mode!r}{growth}, descending={self.descending}"


class ByColumn(_Graded):
    """Ranks rows by a column of numbers, such as a difficulty.

    Args:
        column: Its name, after `columns` has renamed what it renames. Every row has a finite number in it.
        mode: "sorted": each epoch goes from the lowest number to the highest, rows of the same in an order that is
            drawn. "admission": those of the lowest numbers are admitted first, more with each optimizer step.
        start: Share of the rows that is admitted at first; None: 0.25.
        steps: Optimizer steps after which all rows are admitted; the share grows evenly.
        descending: Whether the highest number comes first.
    """

    def __init__(
        self,
        *,
        column: str,
        mode: Literal["sorted", "admission"] = "sorted",
        start: Annotated[float, Range(0, 1, "()")] | None = None,
        steps: Count | None = None,
        descending: bool = False,
    ) -> None:
        check_options(ByColumn.__init__, locals())
        super().__init__(mode, start, steps, descending)
        self.column = column

    def values(self, table: Table, rows: Callable[[], Rows]) -> np.ndarray:
        """The column of each row of the table."""
        if table.source_rows is None:
            raise ValueError(f"curriculum={self}: a packed row holds several rows' values; set packing=False")
        source = rows()
        return np.asarray([self._value(source, int(number)) for number in table.source_rows], dtype=np.float64)

    def _value(self, rows: Rows, index: int) -> float:
        row = rows[index]
        number, value = math.nan, scalar(row.get(self.column))
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                number = float(value)
        if not math.isfinite(number):
            found = f"has {short(row[self.column])}" if self.column in row else "has none"
            raise ValueError(
                f"train: {rows.where(index)} {found} in column {self.column!r}, which the curriculum ranks rows by; "
                "every row needs a finite number there"
            )
        return number

    def __str__(self) -> str:
        return f"ByColumn(column={self.column!r}, {self._told()})"


class ByLength(_Graded):
    """Ranks rows by their tokens, those of the prompt and of all completions.

    Args:
        mode: "sorted": each epoch goes from the shortest row to the longest. "admission": the shortest are admitted
            first, more with each optimizer step.
        start: Share of the rows that is admitted at first; None: 0.25.
        steps: Optimizer steps after which all rows are admitted; the share grows evenly.
        descending: Whether the longest comes first.
    """

    def __init__(
        self,
        *,
        mode: Literal["sorted", "admission"] = "sorted",
        start: Annotated[float, Range(0, 1, "()")] | None = None,
        steps: Count | None = None,
        descending: bool = False,
    ) -> None:
        check_options(ByLength.__init__, locals())
        super().__init__(mode, start, steps, descending)

    def values(self, table: Table, rows: Callable[[], Rows]) -> np.ndarray:
        """The length of each row of the table."""
        if table.source_rows is None:
            raise ValueError(f"curriculum={self}: packed rows are all of about one length; set packing=False")
        return table.lengths.astype(np.float64)

    def __str__(self) -> str:
        return f"ByLength({self._told()})"


class BySuccess(Curriculum):
    """Sets prompts aside that are solved always, or never, by the running mean of their rewards.

    The module tells the rewards of all ranks' completions after each batch, in their own unit, such as 0 and 1 for
    exact match. A prompt never tried is admitted; the places of those set aside go to others at random.

    Args:
        low: Least mean reward of a prompt that is kept.
        high: Greatest mean reward of a prompt that is kept.
        decay: Weight of the past in the mean: it becomes `decay * mean + (1 - decay) * reward`.
        revisit: Share of their places that prompts set aside keep, so that they are tried again and may come back.
    """

    learns = True

    def __init__(
        self,
        *,
        low: Finite = 0.05,
        high: Finite = 0.95,
        decay: Annotated[float, Range(0, 1, "[)")] = 0.5,
        revisit: Annotated[float, Range(0, 1, "()")] = 0.1,
    ) -> None:
        check_options(BySuccess.__init__, locals())
        if low >= high:
            raise ValueError(f"low={low} must be less than high={high}")
        self.low, self.high, self.decay, self.revisit = low, high, decay, revisit

    def order(self, values: np.ndarray, lengths: np.ndarray, plain: Order, batching: Batching, pace: Pace) -> Order:
        """The plain order's batches without what is set aside."""
        options = {"low": self.low, "high": self.high, "decay": self.decay, "revisit": self.revisit}
        return SuccessOrder(plain, lengths, **options, seed=batching.seed, description=str(self))

    def __str__(self) -> str:
        return f"BySuccess(low={self.low}, high={self.high}, decay={self.decay}, revisit={self.revisit})"
