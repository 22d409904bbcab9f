"""Rows of several sources in one table: what is added to each, and what one source has and another lacks."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from datamodules.batching import IGNORE, Table
from datamodules.tables import OF_MIXTURES, CarryingCollate

SOURCE, WEIGHTS, LIMITS, REWARDS = OF_MIXTURES


@dataclass(frozen=True)
class Origin:
    """What a mixture says of all rows of one of its sources.

    Attributes:
        name: The source's name.
        weight: Factor of their loss.
        limit: Most tokens of a completion; None: the module's own limit.
        rewards: Names of the rewards that judge their completions; None: all.
    """

    name: str
    weight: float = 1.0
    limit: int | None = None
    rewards: tuple[str, ...] | None = None


class MixedTable(Table):
    """The tables of several sources, one after the other, each row with its `Origin` and an `index` of its own.

    A row has the keys that any source's rows have: `position_ids`, `loss_weights` and `*_loss_mask` say of a source
    that lacks them what holds without them, a column is None there.

    Args:
        tables: The sources' tables.
        origins: One a table.
        first_index: What the first table's `index` begins with.

    Raises:
        ValueError: The sources' rows cannot stand in one batch; the message names both.
    """

    def __init__(self, tables: Sequence[Table], origins: Sequence[Origin], first_index: int = 0) -> None:
        self.tables, self.origins = list(tables), list(origins)
        self.sizes = [len(table) for table in tables]
        self._ends = np.cumsum(self.sizes)
        firsts = [table.row(0) for table in tables]
        keys = dict.fromkeys(key for row in firsts for key in row)
        self._lacking = [[key for key in keys if key not in row] for row in firsts]
        self._check(firsts)
        self._offsets = np.cumsum([first_index, *map(_span, tables)]).tolist()
        self.next_index: int = self._offsets[-1]
        named = {origin.name: table.fingerprint for origin, table in zip(origins, tables, strict=True)}
        self.fingerprint = f"{zlib.crc32(json.dumps(named).encode()):08x}"

    def _check(self, firsts: Sequence[Mapping[str, Any]]) -> None:
        for origin, lacking in zip(self.origins, self._lacking, strict=True):
            for key in lacking:
                if key in ("margin", "label"):
                    other = next(o.name for o, there in zip(self.origins, firsts, strict=True) if key in there)
                    raise ValueError(
                        f"source {origin.name!r} has no {key}, and source {other!r} has one; give all rows a {key}, or "
                        "none"
                    )

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.concatenate([table.lengths for table in self.tables])

    def row(self, index: int) -> dict[str, Any]:
        """The source's row, filled up, with the keys of its `Origin` under `origin`."""
        source = int(np.searchsorted(self._ends, index, side="right"))
        row = self.tables[source].row(index - (int(self._ends[source - 1]) if source else 0))
        if "index" in row:
            row["index"] += self._offsets[source]
        return row | {key: _filled(key, row) for key in self._lacking[source]} | {"origin": self.origins[source]}


def _filled(key: str, row: Mapping[str, Any]) -> Any:
    """What a row has in a key that its source lacks."""
    if key == "position_ids":
        return np.arange(len(row["input_ids"]))
    if key == "loss_weights":
        return (row["labels"] != IGNORE).astype(np.float32)
    if key.endswith("_loss_mask"):
        return np.ones(len(row[key.removesuffix("_loss_mask")]), dtype=bool)
    return None


def _span(table: Table) -> int:
    """How many numbers a table's own `index` needs."""
    index = getattr(table, "index", None)
    return len(table) if index is None else int(index.max()) + 1


class MixedCollate:
    """Batches of `MixedTable` rows: what the sources' collate function makes of them, and what their origins say.

    Args:
        collates: The sources' collate functions, of one class and alike but for the columns that they carry.
        keys: Those of `OF_MIXTURES` that batches are to have.
    """

    def __init__(self, collates: Sequence[Callable[[list[Any]], Any]], keys: Sequence[str]) -> None:
        carrying = [one for one in collates if isinstance(one, CarryingCollate)]
        names = tuple(dict.fromkeys(name for one in carrying for name in one.names))
        self.collate = CarryingCollate(carrying[0].collate, names) if carrying else collates[0]
        self.keys = tuple(keys)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch: `source_name` (list of text), `source_weights` (float32 `[batch]`), lists of the others."""
        origins: list[Origin] = [row["origin"] for row in rows]
        batch = self.collate([{key: value for key, value in row.items() if key != "origin"} for row in rows])
        own = {
            SOURCE: [origin.name for origin in origins],
            WEIGHTS: torch.tensor([origin.weight for origin in origins], dtype=torch.float32),
            LIMITS: [origin.limit for origin in origins],
            REWARDS: [origin.rewards for origin in origins],
        }
        return batch | {key: own[key] for key in self.keys}
