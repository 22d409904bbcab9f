"""What the data modules share: sources, the tokenizer, row formats, lengths, counts and loaders."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from datamodules.batching import Table
from datamodules.cache.kept import Kept
from datamodules.cache.options import CacheOptions
from datamodules.curricula import Curriculum
from datamodules.loader import EvaluationSampler, ResumableLoader
from datamodules.ranges import MAX_INT, Count, Natural, Range, Seed, check_options
from datamodules.reading import Batches, SplitReader
from datamodules.rows.sources import is_hub_id, load_from_hub
from datamodules.rows.splits import check_share
from datamodules.scheduling import ScheduledRows, check_scheduling
from datamodules.splits import SPLITS, TEST_TARGETS, VALIDATION_PROMPTS, Splits
from datamodules.streams.loader import StreamLoader
from datamodules.streams.options import StreamOptions
from datamodules.streams.stream import TrainStream, is_streamed, stream_options
from datamodules.text.chat import Chat
from datamodules.text.encoding import Encoder, load_tokenizer, read_chat_template, with_tokens
from datamodules.workers import start_worker

logger = logging.getLogger(__name__)

Source = str | Dataset | Sequence[dict[str, Any]] | None
_CACHE = CacheOptions()
_STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class AlignmentDataModule(ScheduledRows, LightningDataModule):
    """Base of the data modules; use one of its subclasses.

    A subclass says which row formats it takes (`accepts`) and how it makes a table of them (`build`).

    Args:
        train: Training rows: a path (JSONL, JSON, CSV, Parquet, text, a folder), a hub id (`owner/name@config:split`),
            a map-style Dataset of dict rows, or a list of dict rows; or an `IterableDataset` of dict rows, of torch or
            of `datasets`, which is a stream.
        validation: Validation rows, or a share between 0 and 1 of the training rows, split off by `seed`.
        test: Test rows.
        predict: Rows to predict.
        tokenizer: A tokenizer, its folder or its hub id; None takes the `tokenizer` attribute of a source.
        max_length: Most tokens of a row.
        batch_size: Rows in a batch of one process.
        eval_batch_size: The same for validation, test and predict; None takes `batch_size`.
        overflow: A row longer than `max_length` is truncated, dropped, or an error. What is lost is counted and logged.
        shuffle: Draw a new order of the training rows each epoch.
        seed: Seed of these orders.
        drop_last: Leave out a last training batch that is not full.
        num_workers: Worker processes of each loader.
        chat_template: Replaces the tokenizer's chat template: "plain", a file, or the template itself.
        added_tokens: Tokens that the tokenizer is to know beside its own, such as a chat template's; the policy needs
            rows for them (`PolicyConfig.added_tokens`).
        as_chat: Turn plain prompts and completions into chat messages.
        columns: New names for columns of the sources, such as {"question": "prompt"}.
        validation_prompts: Of that many validation rows that have a prompt and other columns, such as an `answer`, the
            prompts are also given alone, in a second validation loader, so that completions can be judged. 0: none.
            Modules that write nothing, or are not of this library, get one loader.
        test_targets: Whether test rows with targets are also given with these, in a second test loader.
        max_tokens: Most padded tokens of a training batch of one process, its rows times the longest of them; rows of
            similar length come together, as many as fit, in place of `batch_size`. A row counts with its prompt and all
            of its completions. None: batches have `batch_size` rows.
        curriculum: The order in which training rows come, or which of them are admitted: `ByColumn`, `ByLength` or
            `BySuccess`. None: all, in a new order each epoch.
        stream: Read the training rows on the fly, in blocks, for ever; None: an `IterableDataset` is read so, and all
            else whole.
        cache: Where the tables of large splits are kept on disk, made at the first start by several processes and
            mapped into memory at each; None: every start makes all of them in memory.
    """

    accepts: tuple[str, ...] = ()
    gives_prompts: bool = False
    """Whether batches of every split are prompts."""

    def __init__(
        self,
        *,
        train: Source = None,
        validation: Annotated[float, Range(0, 1, "()")] | Source = None,
        test: Source = None,
        predict: Source = None,
        tokenizer: str | object | None = None,
        max_length: Annotated[int, Range(2, MAX_INT)] = 1024,
        batch_size: Count = 8,
        eval_batch_size: Count | None = None,
        overflow: Literal["split", "truncate", "drop", "error"] = "truncate",
        shuffle: bool = True,
        seed: Seed = 0,
        drop_last: bool = False,
        num_workers: Annotated[int, Range(0, 1024)] = 0,
        chat_template: str | None = None,
        added_tokens: list[str] | None = None,
        as_chat: bool = False,
        columns: dict[str, str] | None = None,
        validation_prompts: Natural = 64,
        test_targets: bool = False,
        max_tokens: Count | None = None,
        curriculum: Curriculum | None = None,
        stream: StreamOptions | None = None,
        cache: CacheOptions | None = _CACHE,
    ) -> None:
        check_options(AlignmentDataModule.__init__, locals())
        super().__init__()
        allowed = self._overflow_policies()
        if overflow not in allowed:
            raise ValueError(f"overflow={overflow!r}; allowed: {', '.join(map(repr, allowed))}")
        if isinstance(validation, bool | int | float):
            check_share(validation, train)
        self.sources: dict[str, Any] = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.max_length, self.overflow = max_length, overflow
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.shuffle, self.seed, self.drop_last, self.num_workers = shuffle, seed, drop_last, num_workers
        self.chat_template, self.as_chat, self.columns = chat_template, as_chat, columns
        self.added_tokens = tuple(added_tokens or ())
        self.validation_prompts, self.test_targets = validation_prompts, test_targets
        self.max_tokens, self.curriculum, self.stream = max_tokens, curriculum, stream
        self.streaming = stream_options(self)
        check_scheduling(self)
        if not isinstance(cache, CacheOptions | None):
            raise ValueError(f"cache={cache!r} must be CacheOptions(...) or null")
        self.cache = cache
        self.kept = None if cache is None else Kept(cache)
        self.reports: dict[str, dict[str, Any]] = {}
        self.given_tokenizer = tokenizer
        self._tokenizer: Any = None
        self._encoder: Encoder | None = None
        self.splits = Splits(self)
        self._tables: dict[str, Batches] = {}
        self.forget_schedule()
        self._stream: TrainStream | None = None
        own = type(self).val_dataloader is AlignmentDataModule.val_dataloader
        if validation is None and own:  # Lightning runs no validation loop where the hook is its own
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    @staticmethod
    def _overflow_policies() -> tuple[str, ...]:
        return ("truncate", "drop", "error")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when first asked for.

        Raises:
            ValueError: None was given and no source has one, or the given one cannot be loaded.
        """
        if self._tokenizer is None:
            given = next(iter(self.offered_tokenizers()), None)
            if given is None:
                raise ValueError(
                    "tokenizer=None, and no source has a `tokenizer` attribute; give a tokenizer, its folder or hub id"
                )
            tokenizer: Any = load_tokenizer(given) if isinstance(given, str) else given
            tokenizer = with_tokens(tokenizer, self.added_tokens) if self.added_tokens else tokenizer
            if self.chat_template is not None:
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.chat_template = read_chat_template(self.chat_template, tokenizer)
            self._tokenizer = tokenizer
        return self._tokenizer

    def offered_tokenizers(self) -> list[Any]:
        """The tokenizer that was given, else those of the sources, as they came: objects, folders or hub ids."""
        if self.given_tokenizer is not None:
            return [self.given_tokenizer]
        found = (getattr(source, "tokenizer", None) for source in self.sources.values())
        return [tokenizer for tokenizer in found if tokenizer is not None]

    def lend_tokenizer(self, tokenizer: Any) -> None:
        """Gives a tokenizer that others use, too, in place of one's own; the chat template stays one's own."""
        self.given_tokenizer, self._tokenizer, self._encoder = tokenizer, None, None

    @property
    def encoder(self) -> Encoder:
        """Turns text into ids with this module's tokenizer."""
        if self._encoder is None:
            self._encoder = Encoder(self.tokenizer)
        return self._encoder

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: the end-of-sequence token and the chat template's end of turn."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return (self.encoder.eos,)
        return Chat(self.tokenizer).stop_token_ids()

    def build(self, reader: SplitReader) -> Batches:
        """Make the table of a split and the function that makes batches of its rows.

        Args:
            reader: The rows of the split, of a format in `accepts`.
        """
        raise NotImplementedError

    def table_options(self) -> Mapping[str, Any]:
        """Options of this class's own that change what `build` makes, as plain values.

        Tables on disk are told apart by them. A class of your own that overrides `build` keeps its tables in memory
        unless it overrides this, too; `build` then also gets ranges of the rows, each for itself.
        """
        return {}

    def prepare_data(self) -> None:
        """Once per machine: download hub data sets, and make the tables on disk that the running stage needs."""
        for split, source in self.sources.items():
            if isinstance(source, str) and is_hub_id(source) and not is_streamed(self, split):
                load_from_hub(source, split)
        stage = None if self.trainer is None else self.trainer.state.fn
        try:
            for split in self._missing(stage):
                self._tables.update(self.splits.prepare(split))
        except (ValueError, OSError, RuntimeError):
            if self.trainer is None or self.trainer.world_size == 1:
                raise
            logger.debug("setup raises it again, in all processes: one that ends here leaves the others waiting")

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the splits that a stage needs, each once.

        Args:
            stage: "fit", "validate", "test", "predict", or None for all that have a source.

        Raises:
            ValueError: A source cannot be read or used; the message names split, place and what is needed.
        """
        for split in self._missing(stage):
            self._tables.update(self._make(split))
        if "train" in self._stage_splits(stage) and "train" in self._tables:
            self.scheduled(self._tables["train"][0])
        if self.streaming is not None and "train" in self._stage_splits(stage):
            self._train_stream()

    def _missing(self, stage: Any) -> list[str]:
        """The splits of a stage that have a source and no table yet, without a stream."""
        tables = [split for split in self._stage_splits(stage) if split != "train" or self.streaming is None]
        return [split for split in tables if self.sources[split] is not None and split not in self._tables]

    @staticmethod
    def _stage_splits(stage: Any) -> tuple[str, ...]:
        return SPLITS if stage is None else _STAGES.get(str(getattr(stage, "value", stage)), SPLITS)

    def train_dataloader(self) -> DataLoader[Any] | StreamLoader:
        """Batches of this rank, resumable (see `ResumableLoader`; those of a stream have no end: `StreamLoader`)."""
        if self.streaming is not None:
            return self._train_stream().loader(*self._ranks())
        table, collate = self._table("train")
        replicas, rank = self._ranks()
        order = self.training_order(table, replicas, self.shuffle and not getattr(self.trainer, "overfit_batches", 0))
        loader = ResumableLoader(table, order, rank=rank, collate_fn=collate, **self._loader_options())
        trainer = self.trainer
        if trainer is not None:
            progress = trainer.fit_loop.epoch_loop.batch_progress
            loader.in_flight = lambda: progress.current.ready - progress.current.processed  # type: ignore[attr-defined]
        self.training_loader = weakref.ref(loader)
        return loader

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Validation batches in the order of the source, each row on one rank; the `validation_prompts` come second."""
        return self._evaluation_loaders("validation")

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Test batches: prompts (with the other columns) where the rows have one, else the training format.

        With `test_targets` there is a second loader of the training format.
        """
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches to predict, in the format of `test_dataloader`."""
        return self._evaluation_loaders("predict")

    def _table(self, split: str) -> Batches:
        if split not in self._tables and self.sources[split] is None:
            raise ValueError(f"{split}=None; give {type(self).__name__} a source for {split}")
        if split == "train" and self.streaming is not None:
            raise ValueError(
                "train is a stream, which has no table, and one is needed here, as for a mixture; leave stream out"
            )
        if split not in self._tables:
            self._tables.update(self._make(split))
        return self._tables[split]

    def _train_stream(self) -> TrainStream:
        if self._stream is None:
            self._stream = TrainStream(self, self.streaming or StreamOptions())
            self.reports["train"] = self._stream.report
        return self._stream

    def without_rows(self) -> Self:
        """A copy that can go to other processes: the options and the tokenizer, without sources, tables and Trainer."""
        self._encoder = self.encoder  # loaded once, before there are copies
        alone = copy.copy(self)
        alone.__dict__.pop("val_dataloader", None)
        alone.trainer, alone.sources, alone.reports = None, dict.fromkeys(SPLITS), {}
        alone._tables, alone._stream, alone.splits = {}, None, Splits(alone)
        alone.forget_schedule()
        return alone

    def _ranks(self) -> tuple[int, int]:
        options = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (int(options["num_replicas"]), int(options["rank"])) if options else (1, 0)

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "generator": torch.Generator(),
            "worker_init_fn": start_worker,
        }

    def _make(self, split: str) -> dict[str, Batches]:
        """The tables of a split, by name."""
        return self.splits.make(split)

    def tables(self, split: str) -> dict[str, Batches]:
        """The table of a split and what makes batches of it, by name; second the rows in another form, where wanted.

        Args:
            split: "train", "validation", "test" or "predict".

        Raises:
            ValueError: The split has no source, or its rows cannot be used.
        """
        found = {split: self._table(split)}
        view, wanted = {
            "validation": (VALIDATION_PROMPTS, bool(self.validation_prompts)),
            "test": (TEST_TARGETS, self.test_targets),
        }.get(split, ("", False))
        return found | {view: self._tables[view]} if wanted and view in self._tables else found

    def _evaluation_loaders(self, split: str) -> DataLoader[Any] | list[DataLoader[Any]]:
        loaders = [self._evaluation_loader(name, *made) for name, made in self.tables(split).items()]
        return loaders if len(loaders) > 1 else loaders[0]

    def _evaluation_loader(self, name: str, table: Table, collate: Callable[[list[Any]], Any]) -> DataLoader[Any]:
        size = self.eval_batch_size or self.batch_size
        replicas, rank = self._ranks()
        if replicas == 1:
            return DataLoader(table, batch_size=size, collate_fn=collate, **self._loader_options())
        if len(table) < replicas:
            logger.warning("%s: %d rows for %d processes, so some rows count twice", name, len(table), replicas)
        sampler = EvaluationSampler(table, batch_size=size, num_replicas=replicas, rank=rank)
        return DataLoader(table, batch_size=None, sampler=sampler, collate_fn=collate, **self._loader_options())

    def first_prompts(self, count: int) -> dict[str, Any] | None:
        """The prompts of the first validation rows as one batch, in the format of test batches of prompts.

        Args:
            count: How many rows.

        Returns:
            The batch; None where there are no validation rows, or they have no prompt, as plain text has none.

        Raises:
            ValueError: A row cannot be read; the message names its place.
        """
        made = self._first_prompts(count)
        if made is None:
            return None
        table, collate = made
        return collate([table.row(number) for number in range(len(table))])

    def _first_prompts(self, count: int) -> Batches | None:
        return None if self.sources["validation"] is None else self.splits.first_prompts(count)
