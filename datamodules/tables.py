"""Rows with columns of their source: prompts beside all of them, other rows beside those that are asked for."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datamodules.batching import Ragged, Table
from datamodules.checksums import joined_crc32
from datamodules.rows import formats
from datamodules.rows.messages import shown
from datamodules.rows.rows import Rows

OF_MIXTURES = ("source_name", "source_weights", "completion_limits", "reward_names")
"""What a batch of a mixture holds beside the sources' own keys, one value a row."""

# Keys of a batch that a source's own column must not take.
RESERVED = (
    *("prompts", "prompt_attention_mask", "index", "responses", "response_mask", "response_loss_mask"),
    *("rewards", "old_logprobs", "completions", "prompt_ids", "completion_ids"),  # the last three are what rewards get
    *OF_MIXTURES,
)


class RowChecksum:
    """A checksum of rows' values one after the other; of objects that are no data only the type counts.

    Args:
        value: Where it begins, or that of `length` bytes.
        length: Bytes of the text of the rows so far.
    """

    def __init__(self, value: int = 0, length: int = 0) -> None:
        self.value, self.length = value, length

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes in one more row."""
        content = (_text(dict(row)) or "").encode()
        self.value, self.length = zlib.crc32(content, self.value), self.length + len(content)

    def append(self, other: RowChecksum) -> None:
        """Takes in all rows of another."""
        self.value = joined_crc32(self.value, other.value, other.length)
        self.length += other.length


def _text(value: Any) -> str | None:
    try:
        return json.dumps(value, default=_plain, skipkeys=True)
    except (TypeError, ValueError):
        return None


def column_checksum(values: Sequence[Any]) -> RowChecksum | None:
    """Of the values of a column as the elements of a list; None where they cannot be written as one."""
    text = _text(list(values))
    if text is None:
        return None
    content = text[1:-1].encode()
    return RowChecksum(zlib.crc32(content), len(content))


def columns_checksum(columns: Mapping[str, RowChecksum | None], start: int) -> int:
    """A checksum of columns, continued from `start`.

    Args:
        columns: That of each column's values, by name.
        start: What it continues.
    """
    if None in columns.values():
        return start
    total = RowChecksum(start)
    for number, (name, values) in enumerate(columns.items()):
        for part in (f"{', ' if number else '{'}{json.dumps(name)}: [", values, "]"):
            content = part if isinstance(part, RowChecksum) else _checksum_of(str(part))
            total.append(content)
    total.append(_checksum_of("}"))
    return total.value


def _checksum_of(text: str) -> RowChecksum:
    return RowChecksum(zlib.crc32(text.encode()), len(text.encode()))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # an array, a tensor or one of their numbers
        return value.tolist()
    if hasattr(value, "isoformat"):  # a date or a time
        return value.isoformat()
    return value.hex() if isinstance(value, bytes) else type(value).__name__


@dataclass
class PromptSource:
    """What a source's rows are to the batches of its prompts.

    Attributes:
        kind: Their format.
        as_chat: Whether plain prompts become messages.
        used: Columns that the prompt, or what it leaves of the row, came from.
        answers: Whether a row has an answer of its own.
        names: All columns, in order.
    """

    kind: str
    as_chat: bool
    used: set[str] = field(default_factory=set)
    answers: bool = False
    names: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """Names of the columns that every row passes on."""
        used = self.used | ({"prompt", "completion"} if self.answers else {"prompt"})
        return [name for name in self.names if name not in used]

    def clash(self) -> list[str]:
        """Columns whose names batches use themselves."""
        own_answer = self.answers and self.kind != formats.PROMPT_COMPLETION
        return sorted((set(self.names) - self.used) & {*RESERVED, *(("completion",) if own_answer else ())})

    def canonical(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row's prompt, text or messages; and its own answer as text, messages' contents joined, None without one."""
        example = formats.normalise(row, self.kind, as_chat=self.as_chat)
        found: dict[str, Any] = {"prompt": None if example is None else shown(example.prompt)}
        if self.answers:
            completion = None if example is None else example.completion
            if isinstance(completion, list):
                completion = "".join(str(message.get("content", "")) for message in completion)
            found["completion"] = completion
        return found


class PromptTable(Table):
    """Prompts as token ids, with the source's other columns read when asked for.

    Args:
        prompts: Token ids of each prompt.
        index: Row number of each in the source.
        rows: The source.
        source: What its columns are to a batch.
        checksum: A checksum of the source's rows.
        fingerprint: That of the content where it is known, else none.
    """

    def __init__(
        self,
        prompts: Ragged,
        index: np.ndarray,
        rows: Rows,
        source: PromptSource,
        checksum: RowChecksum,
        fingerprint: str = "",
    ) -> None:
        self.prompts, self.index, self.rows, self.source, self.checksum = prompts, index, rows, source, checksum
        self.columns, self.source_rows = source.columns, index
        self.fingerprint = fingerprint or f"{prompts.checksum(checksum.value):08x}"

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each prompt."""
        return self.prompts.lengths

    def row(self, index: int) -> dict[str, Any]:
        """`prompts` (ids), `index` (row number in the source), the columns, `prompt` and perhaps `completion`."""
        source = int(self.index[index])
        values = self.rows[source]
        own = {name: values.get(name) for name in self.columns}
        return {"prompts": self.prompts[index], "index": source, **own, **self.source.canonical(values)}


class SidesTable(Table):
    """Rows of a prompt and one or two completions.

    Args:
        sides: Token ids of each side, by name ("prompt" among them).
        index: A number of each.
        columns: One value a row of other keys, by name.
        loss_masks: Which tokens of a side are to be scored, by the side's name; of a side that lacks one, all.
        source_rows: Row number in the source of each; None: `index`.
        fingerprint: That of the content where it is known, else none.
    """

    def __init__(
        self,
        sides: dict[str, Ragged],
        index: np.ndarray,
        columns: dict[str, np.ndarray] | None = None,
        loss_masks: dict[str, Ragged] | None = None,
        source_rows: np.ndarray | None = None,
        fingerprint: str = "",
    ) -> None:
        self.source_rows = index if source_rows is None else source_rows
        self.sides, self.index, self.columns, self.loss_masks = sides, index, columns or {}, loss_masks or {}
        self.fingerprint = fingerprint or self._fingerprint()

    def _fingerprint(self) -> str:
        checksum = 0
        for values in self.columns.values():
            checksum = zlib.crc32(values.tobytes(), checksum)
        for table in (*self.loss_masks.values(), *self.sides.values()):
            checksum = table.checksum(checksum)
        return f"{checksum:08x}"

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row's sides together."""
        return np.sum([side.lengths for side in self.sides.values()], axis=0)

    def row(self, index: int) -> dict[str, Any]:
        """The sides' ids, `index`, `{side}_loss_mask` where there are some, and the other columns."""
        row: dict[str, Any] = {name: side[index] for name, side in self.sides.items()}
        row.update((f"{name}_loss_mask", mask[index]) for name, mask in self.loss_masks.items())
        row["index"] = int(self.index[index])
        return row | {name: values[index].item() for name, values in self.columns.items()}


class CarryingTable(Table):
    """A table whose rows have further columns.

    Args:
        table: The table.
        columns: One value a row of each column, by name.
        fingerprint: That of the content where it is known, else none.
    """

    def __init__(self, table: Table, columns: Mapping[str, Sequence[Any]], fingerprint: str = "") -> None:
        self.table, self.columns, self.source_rows = table, columns, table.source_rows
        self.fingerprint = fingerprint or self._fingerprint()

    def _fingerprint(self) -> str:
        found = {name: column_checksum(values) for name, values in self.columns.items()}
        return f"{columns_checksum(found, int(self.table.fingerprint, 16)):08x}"

    def __len__(self) -> int:
        return len(self.table)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row of the table."""
        return self.table.lengths

    def row(self, index: int) -> dict[str, Any]:
        """The table's row and the columns' values."""
        return self.table.row(index) | {name: values[index] for name, values in self.columns.items()}


class CarryingCollate:
    """Batches of `CarryingTable` rows: what another makes of them, and each column as a list.

    Args:
        collate: Makes a batch of the rows without the columns.
        names: Names of the columns.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], names: tuple[str, ...]) -> None:
        self.collate, self.names = collate, names

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch."""
        return self.collate(rows) | {name: [row[name] for row in rows] for name in self.names}
