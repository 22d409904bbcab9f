"""One split on its way from rows to a table of token ids: recognised, encoded, fitted to a length, counted."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from datamodules.batching import PromptCollate, Ragged, Table, TokenCollate, TokenTable, cut_left, cut_row, mark, pack
from datamodules.lengths import HowLong, how_long, too_long_warning
from datamodules.progress import Progress, lost
from datamodules.rows import formats
from datamodules.rows.formats import Example
from datamodules.rows.messages import LARGEST_WEIGHT, truth
from datamodules.rows.rows import Rows
from datamodules.tables import CarryingCollate, CarryingTable, PromptSource, PromptTable, RowChecksum
from datamodules.text.encoding import Encoder, LossOn

Batches = tuple[Table, Callable[[list[Any]], Any]]  # a table, and what makes a batch of a list of its rows
_CHUNK = 1024  # rows tokenised in one call


class SplitReader:
    """Reads the rows of one split and keeps count of what becomes of them.

    Args:
        split: Name of the split.
        rows: Its rows.
        kind: Their format.
        encoder: Turns text into ids.
        max_length: Most tokens of a row.
        overflow: "truncate", "drop", "error" or (for documents) "split".
        as_chat: Turn plain prompts and completions into messages.
        bar: Whether a terminal shows how far tokenising is, where that takes more than a second.

    Attributes:
        report: Counts by name: rows read and kept, tokens, and whatever was cut or left out.
        places: How many numbers of `index` a row of the source takes, where one makes several of the table.
        may_be_empty: Whether a table without rows is no error, as that of a block of a stream.
        counted: Names of those counts that were taken row by row.
        start: The first row that is read.
        stop: The row before which reading ends.
        packing: Whether the table's rows are to hold several of the source's.
    """

    def __init__(
        self,
        split: str,
        rows: Rows,
        kind: str,
        encoder: Encoder,
        *,
        max_length: int,
        overflow: str,
        as_chat: bool,
        bar: bool = True,
    ) -> None:
        self.split, self.rows, self.kind, self.encoder = split, rows, kind, encoder
        self.max_length, self.overflow, self.as_chat, self.bar = max_length, overflow, as_chat, bar
        self.report: dict[str, Any] = {"rows": len(rows), "format": kind}
        # Whether `label` holds values that are no truth values in the first rows, so that it is just a column.
        self.labelled = any(row.get("label") is not None for row in islice(rows, formats.SAMPLE))
        self.places, self.may_be_empty = 1, False
        self._lengths = array("q")
        self.how_long: HowLong | None = None  # where the rows themselves were not read
        self.counted: dict[str, None] = {}
        self.start, self.stop, self.is_part, self.packing = 0, len(rows), False, False

    def part(self, start: int, stop: int) -> SplitReader:
        """A reader of some of the rows, which counts for itself.

        What its table holds is not packed, and may be nothing.

        Args:
            start: Their first.
            stop: The row behind their last.
        """
        part = copy.copy(self)
        part.start, part.stop, part.is_part = start, stop, True
        part.report, part.counted, part._lengths = {"rows": stop - start, "format": self.kind}, {}, array("q")
        return part

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row that was compared with `max_length`, before it was cut, int64."""
        return np.asarray(self._lengths, dtype=np.int64)

    def examples(self, see: Callable[[Mapping[str, Any]], None] | None = None) -> Iterator[tuple[int, Example]]:
        """Rows in canonical form, with their numbers; ties of scored completions are counted and left out.

        Args:
            see: Gets every row as it is read.

        Raises:
            ValueError: A row does not fit the format; the message says which row and why.
        """
        for index, row in enumerate(self.rows.between(self.start, self.stop), self.start):
            try:
                if see is not None:
                    see(row)
                example = formats.normalise(row, self.kind, as_chat=self.as_chat)
            except RecursionError:
                raise ValueError(f"{self.place(index)}: a column is nested too deeply") from None
            except ValueError as error:
                raise ValueError(f"{self.place(index)}: {error}") from None
            if example is None:
                self.count("ties")
            else:
                yield index, example

    def encoded(
        self,
        encode: Callable[[Sequence[Example]], Sequence[Any]],
        see: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Rows passed through `encode` in chunks, with their numbers; an error inside names the row."""
        examples, done = self.examples(see), self.start
        with Progress(self.split, self.stop - self.start, self.bar and not self.is_part) as progress:
            while chunk := list(islice(examples, _CHUNK)):
                try:
                    results = encode([example for _, example in chunk])
                except ValueError:
                    results = [self._encode_one(encode, index, example) for index, example in chunk]
                yield from zip((index for index, _ in chunk), results, strict=True)
                progress.add(chunk[-1][0] + 1 - done, lost(self.report))
                done = chunk[-1][0] + 1

    def _encode_one(self, encode: Callable[[Sequence[Example]], Sequence[Any]], index: int, example: Example) -> Any:
        try:
            return encode([example])[0]
        except ValueError as error:
            raise ValueError(f"{self.place(index)}: {error}") from error

    @staticmethod
    def _refuse_label(row: Mapping[str, Any]) -> None:
        if truth(row.get("label")) is not None:
            raise ValueError(
                "has a label of desirability, which the first rows lack, so it may not be to be learnt; give all rows "
                "one and a module for such pairs, or rename the column"
            )

    def place(self, index: int) -> str:
        """Split and place of a row, in words."""
        return f"{self.split}: {self.rows.where(index)}"

    def count(self, what: str) -> None:
        """Add one to a count of the report."""
        self.counted[what] = None
        self.report[what] = self.report.get(what, 0) + 1

    def too_long(self, index: int, length: int) -> bool:
        """Whether row `index`, of `length` tokens, is left out; a row that is or that must be cut is counted.

        Raises:
            ValueError: The row is too long and `overflow="error"`.
        """
        self._lengths.append(length)
        self.counted["longest"] = None
        self.report["longest"] = max(self.report.get("longest", 0), length)
        if length <= self.max_length:
            return False
        if self.overflow == "error":
            raise ValueError(
                f"{self.place(index)} has {length} tokens, max_length={self.max_length}; raise it, or set "
                "overflow='truncate' or overflow='drop'"
            )
        self.count("dropped_too_long" if self.overflow == "drop" else "truncated")
        return self.overflow == "drop"

    def check_not_empty(self, kept: int) -> None:
        """Refuse a split of which nothing is left.

        Raises:
            ValueError: No row is left; the message says why.
        """
        self.report["kept"] = kept
        if kept or self.is_part or self.may_be_empty:
            return
        if self.report.get("dropped_too_long", 0) == self.report["rows"]:
            raise ValueError(
                f"{self.split}: every row is longer than max_length={self.max_length} (the longest has "
                f"{self.report['longest']} tokens), so overflow='drop' leaves none; raise max_length or set "
                "overflow='truncate'"
            )
        raise ValueError(f"{self.split}: no row is left to use: {self.describe()}")

    def mostly_too_long(self) -> str:
        """A warning that names a fitting length where more than half of the rows are too long, else nothing."""
        found = self.how_long or how_long(self.lengths, self.max_length)
        return too_long_warning(self.split, self.max_length, found)

    def describe(self) -> str:
        """The report in words."""
        return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.report.items())

    def token_rows(self, loss_on: LossOn, taken: array[int] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and masks of language-modelling rows that have a target, cut to `max_length` (unless they are split).

        The mask of a row with weights, of its own (column `weight`) or of its replies, holds these: float32, 0 where no
        target.

        Args:
            loss_on: Which tokens are targets.
            taken: Gets the number of every row that is given.
        """
        refuses, weights = self.kind in formats.DEMONSTRATIONS and not self.labelled, array("d")

        def see(row: Mapping[str, Any]) -> None:
            if refuses:
                self._refuse_label(row)
            weights.append(formats.row_weight(row))

        for index, (ids, mask) in self.encoded(lambda examples: self.encoder.supervised(examples, loss_on), see):
            weight = weights[index - self.start]
            if weight != 1:
                mask = self._weighed(index, mask, weight)
            if self.overflow != "split":
                if self.too_long(index, len(ids)):
                    continue
                ids, mask = cut_row(ids, mask, self.max_length, self.encoder.first)
            if mask.any():
                if taken is not None:
                    taken.append(index)
                yield ids, mask
            else:
                self.count("dropped_without_target")

    def _weighed(self, index: int, mask: np.ndarray, weight: float) -> np.ndarray:
        """The weights of row `index`, whose targets have the mask or weights given, times that of the row."""
        found = mask.astype(np.float64) * weight
        if found.max(initial=0.0) > LARGEST_WEIGHT:
            raise ValueError(f"{self.place(index)}: the row's weight times that of a message is no finite number")
        return found.astype(np.float32)

    def token_table(
        self, pairs: Iterable[tuple[np.ndarray, np.ndarray]], packing: bool, taken: Sequence[int] | None = None
    ) -> Batches:
        """A table of ids and masks, packed to `max_length` if asked; with weights where a mask is no bool.

        Args:
            pairs: The ids and masks, read once.
            packing: Whether to pack.
            taken: Row number in the source of each, complete once they are read; None: not known.
        """
        weighed: dict[int, np.ndarray] = {}

        def marked() -> Iterator[np.ndarray]:
            for number, (ids, mask) in enumerate(pairs):
                if mask.dtype != np.bool_:
                    weighed[number] = mask
                yield mark(ids, mask)

        tokens, weights = Ragged(marked()), None
        self.check_not_empty(len(tokens))
        self.report.update(tokens=len(tokens.values), targets=int((tokens.values >= 0).sum()))
        if weighed:
            weights = Ragged((weighed.get(i, tokens[i] >= 0) for i in range(len(tokens))), np.float32)
            self.report["weighted"] = len(weighed)
        self.packing = packing
        numbers = None if taken is None else np.asarray(taken, dtype=np.int64)
        bins = pack(tokens.lengths, self.max_length) if packing and not self.is_part else None
        table = TokenTable(tokens, bins, weights, numbers)
        if bins is not None:
            self.report["packed_rows"] = len(table)
        return table, TokenCollate(self.encoder.pad)

    def carried(self, batches: Batches, names: Sequence[str], taken: Sequence[int]) -> Batches:
        """Adds columns of the source to a table, as they are: a batch has a list of each.

        Args:
            batches: The table, and what makes its batches.
            names: Names of the columns.
            taken: Row number in the source of each of the table's rows.

        Raises:
            ValueError: A row has no such column, or null in it.
        """
        table, collate = batches
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for index in taken:
            row = self.rows[index]
            for name, values in columns.items():
                if row.get(name) is None:
                    raise ValueError(f"{self.place(index)} has no {name!r}, which carry={list(names)} asks for")
                values.append(row[name])
        return CarryingTable(table, columns), CarryingCollate(collate, tuple(names))

    def prompt_table(self) -> Batches:
        """A table of the rows' prompts, as ids and as they are, with all other columns."""
        prompts, index = list[np.ndarray](), list[int]()
        names, checksum, source = dict[str, None](), RowChecksum(), PromptSource(self.kind, self.as_chat)
        if self.kind == formats.SCORED:  # the prompt alone counts here, also where all completions are equally good
            source = PromptSource(formats.PROMPT, self.as_chat, used={"completions", "rewards"})
        elif self.kind == formats.UNPAIRED:  # as it does with any label, or none
            source = PromptSource(formats.demonstration(self.rows[0]), self.as_chat)
        self.kind = source.kind

        def encode(examples: Sequence[Example]) -> list[np.ndarray]:
            for example in examples:
                if example.prompt == []:
                    raise ValueError("the conversation starts with an assistant message, so its prompt is empty")
                source.used.update(example.used)
                source.answers |= example.completion is not None
            return self.encoder.prompts(examples)

        def see(row: Mapping[str, Any]) -> None:
            names.update(dict.fromkeys(row))
            checksum.add(row)

        for number, ids in self.encoded(encode, see):
            if len(ids) == 0:
                raise ValueError(f"{self.place(number)}: the prompt has no token")
            if not self.too_long(number, len(ids)):
                prompts.append(cut_left(ids, self.max_length, self.encoder.first))
                index.append(number)
        source.names = list(names)
        if not self.is_part:
            self.check_columns(source)
        self.check_not_empty(len(prompts))
        table = PromptTable(Ragged(prompts), np.asarray(index, dtype=np.int64), self.rows, source, checksum)
        self.report["tokens"] = len(table.prompts.values)
        return table, PromptCollate(self.encoder.pad)

    def check_columns(self, source: PromptSource) -> None:
        """Refuse columns whose names batches use themselves.

        Raises:
            ValueError: There is one.
        """
        clash = source.clash()
        if clash:
            raise ValueError(
                f"{self.split}: {self.rows.name} has the columns {clash}, which batches use themselves; rename them, "
                f"as in columns={{'{clash[0]}': '{clash[0]}_column'}}"
            )
