"""What the rows of a split are: which they are, their format, whether their prompts alone count, and their tables."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from datamodules.reading import Batches, SplitReader
from datamodules.rows import formats
from datamodules.rows.questions import question_name
from datamodules.rows.rows import RenamedRows, Rows, SequenceRows
from datamodules.rows.sources import has_validation, open_source
from datamodules.rows.splits import first_rows, take_share
from datamodules.streams.stream import first_of

if TYPE_CHECKING:
    from datamodules.base import AlignmentDataModule

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "predict")
# The same rows once more, in another form.
VALIDATION_PROMPTS, TEST_TARGETS = "validation prompts", "test targets"
_PROMPTED = tuple(name for name in formats.COLUMNS if name != formats.TEXT)


class Splits:
    """Opens, recognises and reads the splits of a data module.

    Args:
        data: The data module, whose sources, options and `build` count.
    """

    def __init__(self, data: AlignmentDataModule) -> None:
        self.data = data
        self._prepared: dict[str, Rows] = {}
        self._shares_told: set[str] = set()

    def rows(self, split: str) -> Rows:
        """The rows of a split: its source's, or its share of the training rows, with columns renamed.

        Args:
            split: "train", "validation", "test" or "predict"; it has a source.

        Raises:
            ValueError: The source cannot be read, or a column cannot be renamed.
        """
        data, given = self.data, self.data.sources["validation"]
        share = given if isinstance(given, float) else None
        opened = "train" if share and split == "validation" else split
        source, first = data.sources[opened], first_of(data, opened)
        rows: Rows = open_source(source, opened, data.kept) if first is None else SequenceRows(first, str(source))
        if split == "train" and given is None and has_validation(source):
            logger.info("train=%r has rows for validation, too; validation=%r uses them", source, source)
        if share and split in ("train", "validation"):
            every, rows = len(rows), take_share(rows, share, data.seed, split)
            told = "%s: %d of %d rows of train, by validation=%s and seed=%d"
            if split not in self._shares_told:  # once, however often they are opened
                logger.info(told, split, len(rows), every, share, data.seed)
            self._shares_told.add(split)
        return RenamedRows(rows, data.columns) if data.columns else rows

    def prepare(self, split: str) -> dict[str, Batches]:
        """Makes the tables of a split that are kept on disk, for other processes; of others nothing.

        Args:
            split: "train", "validation", "test" or "predict"; it has a source.

        Returns:
            The tables, by name.

        Raises:
            ValueError: The rows cannot be read or used; the message names split, place and what is needed.
        """
        kept, rows = self.data.kept, self.rows(split)
        self._prepared[split] = rows
        return self.make(split) if kept is not None and len(rows) >= kept.options.least_rows else {}

    def make(self, split: str) -> dict[str, Batches]:
        """The tables of a split, by name: its own, and the same rows in another form where that is wanted.

        Args:
            split: "train", "validation", "test" or "predict"; it has a source.

        Raises:
            ValueError: The rows cannot be read or used; the message names split, place and what is needed.
        """
        data, rows = self.data, self._prepared.pop(split, None)
        rows = self.rows(split) if rows is None else rows
        seen = formats.summary(rows)
        kind, prompts = self.recognise(split, rows, seen)
        if split == "validation" and prompts:
            rows = first_rows(rows, data.validation_prompts)
        made = {split: self._made(self.reader(split, rows, kind, seen, data.overflow), prompts)}
        if split == "validation" and not prompts and self._completes_validation():
            made |= self._prompts_of(rows)
        if split == "test" and data.test_targets:
            if data.gives_prompts or kind not in data.accepts:
                raise ValueError(f"test_targets=True, but {rows.name} has no targets: its format is {kind!r}")
            if prompts:
                made[TEST_TARGETS] = self._made(self.reader(TEST_TARGETS, rows, kind, seen, data.overflow), False)
        return made

    def first_prompts(self, count: int) -> Batches | None:
        """The prompts of the first validation rows; None where they have no prompt.

        Args:
            count: How many rows.

        Raises:
            ValueError: A row cannot be read; the message names its place.
        """
        reader = self._prompt_reader("validation", self.rows("validation"), count, overflow="truncate")
        return None if reader is None else reader.prompt_table()

    def recognise(self, split: str, rows: Rows, seen: dict[str, Any]) -> tuple[str, bool]:
        """The format of a split's rows, and whether their prompts alone are used.

        Args:
            split: "train", "validation", "test" or "predict".
            rows: Its rows.
            seen: What `formats.summary` says of the first.

        Raises:
            ValueError: They have no format that the data module accepts.
        """
        accepted = self.data.accepts
        if split in ("test", "predict"):  # prompts where the rows have some
            if kind := self._prompt_format(seen):
                return kind, True
            accepted = tuple(dict.fromkeys((*accepted, *_PROMPTED)))
        kind = formats.recognise(seen, self.data.accepts)
        bare = kind is None and formats.recognise(seen, (formats.PROMPT,))
        if bare and split == "validation" and self._completes_validation():
            return bare, True
        if kind is None:
            found = formats.recognise(seen)
            found = f"; that is the format '{found}'" if found else ""
            if empty := sorted(seen.keys() - formats.present(seen)):
                found = f", and nothing but null in {empty}{found}"
            found += _misspelt(seen, accepted)
            raise ValueError(
                f"{split}: {rows.where(0)} has the columns {sorted(formats.present(seen))}{found}; "
                f"{type(self.data).__name__} needs {formats.describe(accepted)} (rename columns with columns=...)"
            )
        return kind, False

    def _completes_validation(self) -> bool:
        """Whether completions of validation prompts are wanted, and the Trainer's module makes them."""
        module = getattr(self.data.trainer, "lightning_module", None)
        return bool(
            self.data.validation_prompts and not self.data.gives_prompts and getattr(module, "generates", False)
        )

    def _prompt_reader(self, name: str, rows: Rows, count: int, overflow: str) -> SplitReader | None:
        """Reads the first rows as prompts; None: they have none."""
        first = first_rows(rows, count)
        seen = formats.summary(first)
        kind = self._prompt_format(seen)
        return None if kind is None else self.reader(name, first, kind, seen, overflow)

    def _prompt_format(self, seen: dict[str, Any]) -> str | None:
        """The format of rows that have a prompt, in the module's own formats first; None: they have none."""
        own = [name for name in self.data.accepts if name != formats.TEXT]
        return formats.recognise(seen, own) or formats.recognise(seen, _PROMPTED)

    def reader(self, split: str, rows: Rows, kind: str, seen: dict[str, Any], overflow: str) -> SplitReader:
        """Reads rows with the options of the data module.

        Args:
            split: Name of the split.
            rows: The rows.
            kind: Their format.
            seen: What `formats.summary` says of the first.
            overflow: What becomes of a row that is too long.
        """
        data = self.data
        has_template = getattr(data.tokenizer, "chat_template", None) is not None
        as_chat = data.as_chat or (question_name(seen) == "instruction" and has_template)
        bar = data.trainer is None or data.trainer.progress_bar_callback is not None
        return SplitReader(
            *(split, rows, kind, data.encoder),
            max_length=data.max_length,
            overflow=overflow,
            as_chat=as_chat,
            bar=bar and getattr(rank_zero_only, "rank", 0) == 0,
        )

    def _made(self, reader: SplitReader, prompts: bool) -> Batches:
        if reader.split in SPLITS:
            self.data.reports[reader.split] = reader.report
        kept = self.data.kept
        made = None if kept is None else kept.table(self.data, reader, prompts)
        if made is None:
            made = reader.prompt_table() if prompts else self.data.build(reader)
        _log(reader)
        return made

    def _prompts_of(self, rows: Rows) -> dict[str, Batches]:
        """The first validation rows as prompts, where they have some, and columns to judge completions by."""
        data = self.data
        try:
            reader = self._prompt_reader(VALIDATION_PROMPTS, rows, data.validation_prompts, data.overflow)
            made = None if reader is None else self._made(reader, prompts=True)
        except ValueError as error:  # they are valid rows all the same
            logger.info("no completions of validation rows are judged: %s", error)
            return {}
        if made is None:
            return {}
        if not getattr(made[0], "columns", None):
            logger.info(
                "no completions of validation rows are judged: no column beside the prompt, such as an `answer`"
            )
            return {}
        return {VALIDATION_PROMPTS: made}


def _misspelt(seen: Collection[str], accepted: Collection[str]) -> str:
    """Which column could have been meant by one that no format has."""
    wanted = {column for name in accepted for column in formats.COLUMNS[name]}
    strange = sorted(set(seen).difference(*formats.COLUMNS.values()))
    near = ((name, difflib.get_close_matches(name, wanted - set(seen), n=1, cutoff=0.8)) for name in strange)
    return "".join(f"; did you mean {found[0]!r} by {name!r}?" for name, found in near if found)


@rank_zero_only
def _log(reader: SplitReader) -> None:
    lost = [key for key in reader.report if key.startswith("dropped") or key in ("truncated", "ties")]
    level = logging.WARNING if lost else logging.INFO
    if warning := reader.mostly_too_long():
        logger.warning(warning)
    logger.log(level, "%s from %s: %s", reader.split, reader.rows.name, reader.describe())
