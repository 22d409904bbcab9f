"""Tables taken apart into arrays and plain values, joined from parts, and put together again."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from datamodules.batching import PromptCollate, Ragged, SidesCollate, Table, TokenCollate, TokenTable
from datamodules.rows.rows import Rows
from datamodules.tables import (
    CarryingCollate,
    CarryingTable,
    PromptSource,
    PromptTable,
    RowChecksum,
    SidesTable,
    column_checksum,
    columns_checksum,
)


class UnknownForm(Exception):
    """A table or a collate of a class that is not of this library."""


@dataclass
class Pieces:
    """What a table is made of.

    Attributes:
        facts: Plain values.
        ragged: Arrays of different lengths, by name.
        arrays: Arrays of one value a row, by name.
    """

    facts: dict[str, Any]
    ragged: dict[str, Ragged] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def take_apart(table: Table) -> Pieces:
    """What a table is made of.

    Raises:
        UnknownForm: It is of a class of the user's.
    """
    if type(table) is TokenTable:
        ragged = {"tokens": table.tokens, "weights": table.weights, "bins": table.bins}
        return Pieces({"form": "tokens"}, _given(ragged), _given({"source_rows": table.source_rows}))
    if type(table) is SidesTable:
        facts: dict[str, Any] = {"form": "sides", "sides": list(table.sides), "columns": list(table.columns)}
        sides = {f"side_{name}": side for name, side in table.sides.items()}
        masks = {f"mask_{name}": mask for name, mask in table.loss_masks.items()}
        columns = {f"column_{name}": values for name, values in table.columns.items()}
        return Pieces(facts, sides | masks, _given({**columns, "index": table.index, "source_rows": table.source_rows}))
    if type(table) is PromptTable:
        source, checksum = table.source, [table.checksum.value, table.checksum.length]
        facts = {"form": "prompts", "checksum": checksum, **asdict(source), "used": sorted(source.used)}
        return Pieces(facts, {"prompts": table.prompts}, {"index": table.index})
    if type(table) is CarryingTable and table.source_rows is not None:
        inner = take_apart(table.table)
        found = {name: column_checksum(values) for name, values in table.columns.items()}
        texts = {name: None if text is None else [text.value, text.length] for name, text in found.items()}
        return Pieces({"form": "carrying", "inner": inner.facts, "columns": texts}, inner.ragged, inner.arrays)
    raise UnknownForm(type(table).__name__)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def put_together(pieces: Pieces, rows: Rows) -> Table:
    """The table of `take_apart`.

    Args:
        pieces: What it is made of; where the fingerprint is known it is among the plain values.
        rows: Its source.
    """
    facts, ragged, arrays = pieces.facts, pieces.ragged, pieces.arrays
    fingerprint = facts.get("fingerprint", "")
    if facts["form"] == "tokens":
        weights, packing = ragged.get("weights"), ragged.get("bins")
        return TokenTable(ragged["tokens"], packing, weights, arrays.get("source_rows"), fingerprint)
    if facts["form"] == "sides":
        sides = {name: ragged[f"side_{name}"] for name in facts["sides"]}
        masks = {name: ragged[f"mask_{name}"] for name in facts["sides"] if f"mask_{name}" in ragged}
        columns = {name: arrays[f"column_{name}"] for name in facts["columns"]}
        return SidesTable(sides, arrays["index"], columns, masks, arrays["source_rows"], fingerprint)
    if facts["form"] == "prompts":
        source = PromptSource(facts["kind"], facts["as_chat"], set(facts["used"]), facts["answers"], facts["names"])
        checksum = RowChecksum(*facts["checksum"])
        return PromptTable(ragged["prompts"], arrays["index"], rows, source, checksum, fingerprint)
    inner = put_together(Pieces(facts["inner"], ragged, arrays), rows)
    carried = {name: SourceColumn(rows, arrays["source_rows"], name) for name in facts["columns"]}
    texts = {name: None if text is None else RowChecksum(*text) for name, text in facts["columns"].items()}
    fingerprint = fingerprint or f"{columns_checksum(texts, int(inner.fingerprint, 16)):08x}"
    return CarryingTable(inner, carried, fingerprint)


def with_fingerprint(facts: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """The plain values of a table, and its fingerprint among them."""
    found = {**facts, "fingerprint": table.fingerprint}
    if isinstance(table, CarryingTable):
        found["inner"] = with_fingerprint(facts["inner"], table.table)
    return found


class SourceColumn(Sequence[Any]):
    """The values of a column of the source, read when asked for.

    Args:
        rows: The source.
        numbers: Row number in it of each value, `[rows]`.
        name: The column.
    """

    def __init__(self, rows: Rows, numbers: np.ndarray, name: str) -> None:
        self.rows, self.numbers, self.name = rows, numbers, name

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[int(self.numbers[index])][self.name]


def collate_facts(collate: Any) -> dict[str, Any]:
    """What makes batches of a table's rows, as plain values.

    Raises:
        UnknownForm: It is of a class of the user's.
    """
    if type(collate) is TokenCollate:
        return {"form": "tokens", "pad": collate.pad_id, "side": collate.side}
    if type(collate) is SidesCollate:
        return {"form": "sides", "pad": collate.pad_id, "names": list(collate.names)}
    if type(collate) is PromptCollate:
        return {"form": "prompts", "pad": collate.pad_id}
    if type(collate) is CarryingCollate:
        return {"form": "carrying", "inner": collate_facts(collate.collate), "names": list(collate.names)}
    raise UnknownForm(type(collate).__name__)


def collate_of(facts: Mapping[str, Any]) -> Callable[[list[Any]], Any]:
    """What makes batches, of `collate_facts`."""
    if facts["form"] == "tokens":
        return TokenCollate(facts["pad"], facts["side"])
    if facts["form"] == "sides":
        return SidesCollate(facts["pad"], tuple(facts["names"]))
    if facts["form"] == "prompts":
        return PromptCollate(facts["pad"])
    return CarryingCollate(collate_of(facts["inner"]), tuple(facts["names"]))


def join_facts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The plain values of the table that parts make one after the other."""
    joined = dict(parts[0])
    if joined["form"] == "prompts":
        total = RowChecksum()
        for part in parts:
            total.append(RowChecksum(*part["checksum"]))
        joined["checksum"] = [total.value, total.length]
        joined["names"] = list(dict.fromkeys(name for part in parts for name in part["names"]))
        joined["used"] = sorted({name for part in parts for name in part["used"]})
        joined["answers"] = any(part["answers"] for part in parts)
    if joined["form"] == "carrying":
        joined["inner"] = join_facts([part["inner"] for part in parts])
        joined["columns"] = {name: _join_texts([p["columns"][name] for p in parts]) for name in joined["columns"]}
    return joined


def _join_texts(parts: Sequence[list[int] | None]) -> list[int] | None:
    """The checksum of a column's values, written one behind the other, from those of its parts; and their length."""
    total, comma = RowChecksum(), RowChecksum(zlib.crc32(b", "), 2)
    for part in parts:
        if part is None:
            return None
        if part[1]:
            if total.length:
                total.append(comma)
            total.append(RowChecksum(*part))
    return [total.value, total.length]


def missing(name: str, ragged: Mapping[str, Ragged]) -> Ragged:
    """What a part that has no weights, or no masks, would have in their place where another part has some."""
    if name == "weights":
        tokens = ragged["tokens"]
        return Ragged.of((np.asarray(tokens.values) >= 0).astype(np.float32), tokens.offsets)
    side = ragged[f"side_{name.removeprefix('mask_')}"]
    return Ragged.of(np.ones(len(side.values), dtype=np.bool_), side.offsets)
