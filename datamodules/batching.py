"""Lengths, packing, compact storage of tokens, and batches."""

from __future__ import annotations

import bisect
import zlib
from array import array
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORE = -100


class Ragged:
    """Many arrays of different lengths in one flat buffer (4 bytes a token), cheap to share with workers.

    Args:
        arrays: The arrays `[time_i]`; an iterator is read once, and never held as many small arrays.
        dtype: Type of the buffer.
    """

    def __init__(self, arrays: Iterable[np.ndarray], dtype: Any = np.int32) -> None:
        lengths = array("q")
        blocks: list[np.ndarray] = []
        arrays = iter(arrays)
        while parts := [np.asarray(part, dtype=dtype) for part in islice(arrays, 4096)]:
            lengths.extend(map(len, parts))
            blocks.append(np.concatenate(parts))
        self.values = np.concatenate(blocks) if blocks else np.zeros(0, dtype=dtype)
        self.offsets = np.concatenate(([0], np.cumsum(np.asarray(lengths, dtype=np.int64))))

    @classmethod
    def of(cls, values: np.ndarray, offsets: np.ndarray) -> Ragged:
        """Takes a buffer `[elements]`, and where in it each array begins and the last ends, int64 `[rows + 1]`."""
        made = cls(())
        made.values, made.offsets = values, offsets
        return made

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Length of each array, int64 `[rows]`."""
        return np.diff(self.offsets)

    def checksum(self, start: int = 0) -> int:
        """A checksum of all content, continued from `start`."""
        return zlib.crc32(self.offsets.data, zlib.crc32(self.values.data, start))


def room(prompt: int, completion: int, max_length: int) -> tuple[int, int]:
    """How many tokens of a prompt (its last) and of a completion (its first) fit into `max_length`.

    The prompt gives way first, but never below half of `max_length`.

    >>> room(100, 30, 64), room(100, 90, 64), room(10, 90, 64)
    ((34, 30), (32, 32), (10, 54))
    """
    kept = min(prompt, max(max_length - completion, max_length // 2))
    return kept, min(completion, max_length - kept)


def cut_left(ids: np.ndarray, keep: int, first: np.ndarray) -> np.ndarray:
    """The last `keep` tokens; leading special tokens `first` stay where they were."""
    if len(ids) <= keep:
        return ids
    lead = len(first) if 0 < len(first) < keep and np.array_equal(ids[: len(first)], first) else 0
    return np.concatenate((ids[:lead], ids[len(ids) - (keep - lead) :]))


def cut_row(ids: np.ndarray, mask: np.ndarray, max_length: int, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut a row to `max_length`: what precedes the first target from the left, the rest from the right.

    Args:
        ids: Token ids `[time]`.
        mask: Targets, bool or weights `[time]`.
        max_length: Most tokens.
        first: Special tokens that stay in front.
    """
    if len(ids) <= max_length:
        return ids, mask
    start = int(np.argmax(mask != 0)) if mask.any() else len(ids)
    keep, after = room(start, len(ids) - start, max_length)
    return (
        np.concatenate((cut_left(ids[:start], keep, first), ids[start : start + after])),
        np.concatenate((np.zeros(keep, dtype=mask.dtype), mask[start : start + after])),
    )


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Put documents into rows of at most `capacity` tokens, each whole and each once (best fit, longest first).

    Args:
        lengths: Tokens of each document, at most `capacity`.
        capacity: Tokens of a row.

    Returns:
        The documents' numbers of each row.

    >>> pack([3, 5, 2, 4], 7)
    [[1, 2], [3, 0]]
    """
    lengths = np.asarray(lengths)
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a document of {int(lengths.max())} tokens does not fit into a row of {capacity}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows
    free: list[int] = []  # the keys of open_rows, sorted
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        place = bisect.bisect_left(free, length)
        if place == len(free):
            row, left = len(rows), capacity - length
            rows.append([document])
        else:
            key = free[place]
            row, left = open_rows[key].pop(), key - length
            if not open_rows[key]:
                del open_rows[key], free[place]
            rows[row].append(document)
        if left > 0:
            if left not in open_rows:
                bisect.insort(free, left)
                open_rows[left] = []
            open_rows[left].append(row)
    return rows


class Table(Dataset[Any]):
    """A map-style dataset that also takes a list of row numbers, and knows a fingerprint of its content.

    Attributes:
        source_rows: Row number in the source of each row, int64 `[rows]`; None where a row holds several, or it is not
            known.
    """

    fingerprint: str = ""
    source_rows: np.ndarray | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, its prompt and all of its completions, int64 `[rows]`."""
        raise NotImplementedError

    def row(self, index: int) -> dict[str, Any]:
        """One row."""
        raise NotImplementedError

    def __getitem__(self, index: int | list[int]) -> Any:
        return [self.row(i) for i in index] if isinstance(index, list) else self.row(index)


def mark(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Ids and mask in one array: a token that is no target is stored as its complement, a negative number."""
    return np.where(mask != 0, ids, ~ids)


class TokenTable(Table):
    """Rows of token ids with targets, single or packed.

    Args:
        tokens: Each document's ids and targets, as `mark` joins them.
        packing: Documents of each row; None for one document a row.
        weights: Each document's weights, 0 where no target; None: all targets weigh 1.
        source_rows: Row number in the source of each document; None: not known.
        fingerprint: That of the content where it is known, else none.
    """

    def __init__(
        self,
        tokens: Ragged,
        packing: Ragged | list[list[int]] | None = None,
        weights: Ragged | None = None,
        source_rows: np.ndarray | None = None,
        fingerprint: str = "",
    ) -> None:
        self.tokens, self.weights = tokens, weights
        self.source_rows = source_rows if packing is None else None
        self.bins = Ragged(map(np.asarray, packing), np.int64) if isinstance(packing, list) else packing
        self.fingerprint = fingerprint or self._fingerprint()

    def _fingerprint(self) -> str:
        checksum = self.tokens.checksum() if self.weights is None else self.weights.checksum(self.tokens.checksum())
        return f"{checksum if self.bins is None else self.bins.checksum(checksum):08x}"

    def __len__(self) -> int:
        return len(self.tokens) if self.bins is None else len(self.bins)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        lengths = self.tokens.lengths
        return lengths if self.bins is None else np.add.reduceat(lengths[self.bins.values], self.bins.offsets[:-1])

    def row(self, index: int) -> dict[str, Any]:
        """One row as arrays `[time]`.

        Returns:
            `input_ids`, `labels`; for packed rows `position_ids` that restart at each document; and `loss_weights`
            (float32) where the table has weights.
        """
        numbers = [index] if self.bins is None else self.bins[index].tolist()
        documents = [self.tokens[i] for i in numbers]
        tokens = np.concatenate(documents)
        row = {"input_ids": np.where(tokens < 0, ~tokens, tokens), "labels": np.where(tokens < 0, IGNORE, tokens)}
        if self.bins is not None:
            row["position_ids"] = np.concatenate([np.arange(len(document)) for document in documents])
        if self.weights is not None:
            row["loss_weights"] = np.concatenate([self.weights[i] for i in numbers])
        return row


def pad(
    arrays: Sequence[np.ndarray], value: int, *, side: str = "right", dtype: Any = np.int64
) -> tuple[Tensor, Tensor]:
    """Stack arrays of different lengths.

    Args:
        arrays: Arrays `[time_i]` of numbers.
        value: What fills the rest.
        side: Where it is filled: "right" or "left".
        dtype: NumPy's type of the values.

    Returns:
        values: `[batch, time]`, int64 where no other type is asked for.
        mask: int64 `[batch, time]`, 1 on real tokens; made from lengths, so a pad id may also be a real token.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r}; allowed: 'left', 'right'")
    longest = max((len(row) for row in arrays), default=0)
    values = np.full((len(arrays), longest), value, dtype=dtype)
    mask = np.zeros((len(arrays), longest), dtype=np.int64)
    for number, row in enumerate(arrays):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        values[number, place] = row
        mask[number, place] = 1
    return torch.from_numpy(values), torch.from_numpy(mask)


class TokenCollate:
    """Batches of `TokenTable` rows: `input_ids`, `labels`, `attention_mask`, each `[batch, time]`.

    Where the rows have them, also `position_ids` and `loss_weights` (float32, 0 where no target).

    Args:
        pad_id: Fills `input_ids`.
        side: Padding side.
    """

    def __init__(self, pad_id: int, side: str = "right") -> None:
        self.pad_id, self.side = pad_id, side

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad and stack."""
        ids, mask = pad([row["input_ids"] for row in rows], self.pad_id, side=self.side)
        labels, _ = pad([row["labels"] for row in rows], IGNORE, side=self.side)
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        if "position_ids" in rows[0]:
            batch["position_ids"], _ = pad([row["position_ids"] for row in rows], 0, side=self.side)
        if "loss_weights" in rows[0]:
            weights = [row["loss_weights"] for row in rows]
            batch["loss_weights"], _ = pad(weights, 0, side=self.side, dtype=np.float32)
        return batch


class SidesCollate:
    """Batches of rows made of named token sequences: `{name}_input_ids` and `{name}_attention_mask`, `[batch, time]`.

    Prompts are padded on the left and completions on the right, so that a pair stands without a gap. Other keys:
    `index` becomes a list, `label` (bool, or float32 probabilities) and `margin` (float32) tensors `[batch]`, and
    `{name}_loss_mask` an int64 tensor `[batch, time]`.

    Args:
        pad_id: Fills the ids.
        names: The sequences, such as "prompt", "chosen", "rejected".
    """

    def __init__(self, pad_id: int, names: tuple[str, ...]) -> None:
        self.pad_id, self.names = pad_id, names

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad and stack."""
        batch: dict[str, Any] = {}
        for name in self.names:
            side = "left" if name == "prompt" else "right"
            ids, mask = pad([row[name] for row in rows], self.pad_id, side=side)
            batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = ids, mask
            if f"{name}_loss_mask" in rows[0]:
                batch[f"{name}_loss_mask"], _ = pad([row[f"{name}_loss_mask"] for row in rows], 0, side=side)
        batch["index"] = [row["index"] for row in rows]
        for name in ("label", "margin"):
            if name in rows[0]:
                dtype = torch.bool if isinstance(rows[0][name], bool) else torch.float32
                batch[name] = torch.tensor([row[name] for row in rows], dtype=dtype)
        return batch


class PromptCollate:
    """Batches of prompts: `prompts` and `prompt_attention_mask` `[batch, time]`, left-padded; all other keys as lists.

    Args:
        pad_id: Fills the ids.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad and stack."""
        prompts, mask = pad([row["prompts"] for row in rows], self.pad_id, side="left")
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompts"}
        return {"prompts": prompts, "prompt_attention_mask": mask, **columns}
