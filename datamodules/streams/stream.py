"""The training rows of a data module as a stream: what its first rows settle, and what a run needs to read it."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from datamodules.rows import formats
from datamodules.rows.rows import RenamedRows, Rows
from datamodules.rows.sources import is_hub_id
from datamodules.streams.blocks import BlockMaker, BlockRows, Report, add_report
from datamodules.streams.loader import StreamLoader
from datamodules.streams.options import StreamOptions
from datamodules.streams.sources import IterableSource, StreamSource, is_stream, open_stream
from datamodules.streams.tapes import Deal, Found, Row

if TYPE_CHECKING:
    from datamodules.base import AlignmentDataModule

logger = logging.getLogger(__name__)

_FIRST_REPORT = 10_000  # rows after which counts are logged, and again whenever they have doubled
_CHECKED = 8  # first rows that each process compares with those that the main one read
_LOST = ("truncated", "ties")


def stream_options(data: AlignmentDataModule) -> StreamOptions | None:
    """How the training rows are read as a stream; None: they are a table.

    Raises:
        ValueError: Options contradict each other.
    """
    train, options = data.sources["train"], data.stream
    if not isinstance(options, StreamOptions | None):
        raise ValueError(f"stream={options!r} must be StreamOptions(...) or null")
    if options is None and not is_stream(train):
        return None
    options = options or StreamOptions()
    if isinstance(data.sources["validation"], float):
        raise ValueError(
            f"validation={data.sources['validation']} is a share of the training rows, and a stream does not tell how "
            "many it has; give validation rows of their own"
        )
    if data.drop_last:
        raise ValueError("drop_last=True has no effect on a stream, all of whose batches are full; leave it out")
    for name in ("curriculum", "max_tokens"):
        if getattr(data, name) is not None:
            raise ValueError(
                f"{name}={getattr(data, name)!r} chooses among all rows, and a stream knows those of a block alone; "
                f"leave {name} out, or give a table"
            )
    others = [split for split in ("validation", "test", "predict") if _bounded(data.sources[split])]
    if options.eval_rows is not None and not others:
        raise ValueError(
            f"stream.eval_rows={options.eval_rows} bounds validation, test and predict sources that are streams or hub "
            "ids, and none is; leave it out"
        )
    return options


def _bounded(source: Any) -> bool:
    return is_stream(source) or is_hub_id(source)


def is_streamed(data: AlignmentDataModule, split: str) -> bool:
    """Whether nothing of a split's source is read before its rows are asked for, one after the other."""
    if split == "train":
        return data.streaming is not None
    return data.stream is not None and data.stream.eval_rows is not None


def first_of(data: AlignmentDataModule, split: str) -> list[Row] | None:
    """The first `eval_rows` rows of a validation, test or predict source that is a stream; None: it is none.

    Raises:
        ValueError: It is one, and nothing bounds it.
    """
    source, count = data.sources[split], None if data.stream is None else data.stream.eval_rows
    if count is None and is_stream(source):
        raise ValueError(
            f"{split}={type(source).__name__} is a stream, which may have no end; set stream.eval_rows to how many of "
            "its first rows are to be used, or give a table"
        )
    if count is None or not _bounded(source):
        return None
    return [found.row for found in _read_first(open_stream(source, split), split, count)]


def _read_first(source: StreamSource, split: str, count: int) -> list[Found]:
    """The first rows of a stream, which are still to come when it is opened anew."""
    try:
        found = source.open(Deal()).read(count)
    except ValueError as error:
        raise ValueError(f"{split}: {error}") from error
    if not found:
        raise ValueError(f"{split}={source.name!r} has no rows; at least one is needed")
    return found


class TrainStream:
    """The training rows of a data module, of which the first were read: they tell the format, and are read again.

    Args:
        data: The data module.
        options: How its stream is read.

    Attributes:
        report: Counts of what this rank has read so far.

    Raises:
        ValueError: The source cannot be read, has no rows, or rows of no format of the data module.
    """

    def __init__(self, data: AlignmentDataModule, options: StreamOptions) -> None:
        self.data, self.options = data, options
        if data.trainer is not None:
            check_trainer(data.trainer, validates=data.sources["validation"] is not None)
        self.source = open_stream(data.sources["train"], "train")
        found = _read_first(self.source, "train", formats.SAMPLE)
        if isinstance(self.source, IterableSource):
            self.source.expect([row for _, _, row in found[:_CHECKED]])
        rows: Rows = BlockRows(found, self.source)
        if data.columns:
            rows = RenamedRows(rows, data.columns)
        seen = formats.summary(rows)
        kind, _ = data.splits.recognise("train", rows, seen)
        self._maker = BlockMaker(
            source=self.source,
            data=data.without_rows(),
            kind=kind,
            seen=seen,
            labelled=any(row.get("label") is not None for row in rows),
            first=found[0].row,
            keys=(),
            buffer_size=options.buffer_size,
        )
        # read here once, so that what is wrong with the first rows is told by all ranks, before anything else begins
        table, _, reader = self._maker.make(found)
        self._maker = replace(self._maker, keys=tuple(table.row(0)) if len(table) else ())
        self.fingerprint, self._next_log = table.fingerprint, _FIRST_REPORT
        self.report: Report = {"passes": 0, "rows": 0, "format": kind}
        _log(f"train from {self.source.name}, a stream; its first rows: {reader.describe()}", reader.report)

    def loader(self, replicas: int, rank: int) -> StreamLoader:
        """Batches of a rank.

        Args:
            replicas: Number of ranks; all call this.
            rank: This one.

        Raises:
            ValueError: The Trainer does not fit a stream, or the ranks read different rows.
        """
        data, trainer = self.data, self.data.trainer
        ranks = _Ranks(trainer, replicas, rank)
        if len(set(ranks.gather(self.fingerprint) or [])) > 1:
            raise ValueError(
                f"train: {self.source.name} gives other rows on each rank; give all of it to each, since rows are "
                "dealt to ranks and workers here"
            )
        settings: dict[str, Any] = {"seed": data.seed, "shuffle": data.shuffle, "max_length": data.max_length}
        settings |= {"packing": getattr(data, "packing", False), "first_rows": self.fingerprint}
        loader = StreamLoader(
            self._maker,
            batch_size=data.batch_size,
            rank=rank,
            replicas=replicas,
            num_workers=data.num_workers,
            settings=settings | {f"stream.{name}": value for name, value in asdict(self.options).items()},
            gather=ranks.gather,
        )
        loader.heard = self._hear
        if trainer is not None:
            check_trainer(trainer, validates=data.sources["validation"] is not None)
            progress = trainer.fit_loop.epoch_loop.batch_progress
            loader.done = lambda: progress.total.processed  # type: ignore[attr-defined]
            # one batch may be in a step, one is fetched ahead, and a step that is not complete is taken again
            loader.margin = lambda: trainer.accumulate_grad_batches + 2
        return loader

    def _hear(self, report: Report) -> None:
        self.report.clear()
        add_report(self.report, report)
        if report["rows"] >= self._next_log:
            self._next_log = 2 * report["rows"]
            words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in report.items())
            _log(f"train from {self.source.name}, a stream; read so far by rank 0: {words}", report)


class _Ranks:
    """The ranks of a run.

    Args:
        trainer: Its Trainer.
        replicas: How many read data.
        rank: Which of them this one is.
    """

    def __init__(self, trainer: Trainer | None, replicas: int, rank: int) -> None:
        self.trainer, self.replicas, self.rank = trainer, replicas, rank

    def gather(self, value: Any) -> list[Any] | None:
        """The value of each, in order; None where a run was interrupted, since the others may be elsewhere."""
        if self.replicas == 1 or not torch.distributed.is_initialized():
            return [value] * self.replicas
        if self.trainer is None or self.trainer.state.status == TrainerStatus.INTERRUPTED:
            return None
        values: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, (self.rank, value))
        found = dict(values)
        return [found[rank] for rank in range(self.replicas)]


def check_trainer(trainer: Trainer, *, validates: bool) -> None:
    """Refuse what Lightning cannot do with a loader that has no end.

    Args:
        trainer: The Trainer.
        validates: Whether there are validation rows.

    Raises:
        ValueError: Nothing ends the run, validation would never come, or a part of an epoch is asked for.
    """
    batches = trainer.limit_train_batches
    if isinstance(batches, float) and batches != 1.0:
        raise ValueError(
            f"trainer.limit_train_batches={batches}: a stream has no number of batches that this could be a share of; "
            "give an integer, or leave it out"
        )
    if overfit := getattr(trainer, "overfit_batches", 0):
        raise ValueError(
            f"trainer.overfit_batches={overfit} needs training rows that can be read again: give a "
            "table of few rows instead of a stream"
        )
    epochs = isinstance(batches, int) and trainer.max_epochs not in (None, -1)
    if trainer.max_steps == -1 and not epochs:
        raise ValueError(
            "trainer.max_steps=-1: the training rows are a stream, which has no end, so the run needs one: set "
            "trainer.max_steps (optimizer steps), or trainer.limit_train_batches to an integer, the batches of an "
            "epoch, with trainer.max_epochs"
        )
    interval = trainer.val_check_interval
    if validates and trainer.limit_val_batches and isinstance(interval, float) and not isinstance(batches, int):
        raise ValueError(
            f"trainer.val_check_interval={interval}: a stream has no end of an epoch at which to validate; set "
            "trainer.val_check_interval to an integer, the batches between two validations, or "
            "trainer.limit_val_batches=0 for none"
        )


@rank_zero_only
def _log(message: str, report: Report) -> None:
    lost = any(key.startswith("dropped") or key in _LOST for key in report)
    logger.log(logging.WARNING if lost else logging.INFO, message)
