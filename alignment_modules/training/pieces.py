"""A batch of rows, cut into micro-batches; what stands in where a rank has fewer than the others."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from alignment_modules.training.sources import check_sources

SEGMENTS = "segments"  # what an objective reads: of the whole batch, or a list of those of its pieces


def cut(batch: Mapping[str, Any], size: int | None) -> list[dict[str, Any]]:
    """Cuts a batch into pieces of at most `size` rows, in order.

    Tensors and lists are cut along their first dimension; numbers, strings and the like go to every piece. The
    `segments` of a whole batch are not carried to its parts; a list of them, one a piece, is handed out.

    Args:
        batch: A dictionary of row tensors `[rows, ...]` and lists of `rows` entries.
        size: Rows of a piece; None: all.

    Returns:
        The pieces; none of a batch without rows.

    Raises:
        ValueError: If two entries have another number of rows, or none has rows.

    Example:
        >>> cut({"x": [1, 2, 3], "name": "a"}, 2)
        [{'x': [1, 2], 'name': 'a'}, {'x': [3], 'name': 'a'}]
    """
    rows, segments = count_rows(batch), batch.get(SEGMENTS)
    if size is None or (size >= rows and not isinstance(segments, list)):
        return [dict(batch)] if rows else []
    pieces = [_select(batch, slice(start, start + size)) for start in range(0, rows, size)]
    if isinstance(segments, list):
        pieces = [{**piece, SEGMENTS: own} for piece, own in zip(pieces, segments, strict=True)]
    return pieces


def empty_like(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without a row.

    Args:
        batch: A dictionary of row tensors and lists.
    """
    return _select(batch, slice(0, 0))


def reads_as_carried(module: L.LightningModule) -> bool:
    """Whether nothing can change a batch between the host, where its `segments` are built, and its objective.

    A data module's hooks, and a subclass's steps, may: the objective then builds the segments from what it is given.

    Args:
        module: One that defines `segments`.
    """
    data = getattr(module.trainer, "datamodule", None)
    hooks = ("transfer_batch_to_device", "on_after_batch_transfer")
    if data is not None and any(
        getattr(type(data), hook) is not getattr(L.LightningDataModule, hook) for hook in hooks
    ):
        return False
    for cls in type(module).__mro__:
        if SEGMENTS in vars(cls):
            return True
        if any(name in vars(cls) for name in (*hooks, "objective", "training_step", "validation_step")):
            return False
    return False


def check_keys(batch: Any, keys: Sequence[str], name: str) -> None:
    """Checks that a batch holds what it is read for.

    Args:
        batch: What the loader gave.
        keys: What it must hold.
        name: Who reads it, for the message.

    Raises:
        ValueError: If it is not a dictionary or lacks a key, or what it says of its rows' sources is not allowed.
    """
    found = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
    missing = [key for key in keys if not isinstance(batch, Mapping) or key not in batch]
    if missing:
        raise ValueError(
            f"a batch for {name} must hold {', '.join(keys)}; this one lacks {', '.join(missing)}: it holds {found}. "
            "Does the data module belong to another paradigm?"
        )
    check_sources(batch)


def count_tokens(batch: Mapping[str, Any]) -> dict[str, Tensor | int]:
    """How much a batch holds by its masks: `tokens` (without padding), `samples` and `padding`."""
    # A loss mask says which of the tokens are scored, and adds none.
    counted = [key for key in batch if key.endswith("mask") and not key.endswith("loss_mask")]
    masks = [batch[key] for key in counted if isinstance(batch[key], Tensor)]
    if not masks:
        masks = [torch.ones_like(batch["input_ids"])]
    tokens = torch.stack([mask.sum() for mask in masks]).sum()
    return {"tokens": tokens, "samples": len(masks[0]), "padding": sum(m.numel() for m in masks) - tokens}


def join(pieces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Puts pieces together again, or the batches of several ranks: the rows of all, in order.

    Args:
        pieces: At least one dictionary of row tensors and lists. An entry that one of them lacks is left out; tensors
            `[rows, time]` are padded with 0 on the right to the longest.

    Example:
        >>> join([{"x": torch.tensor([[1]]), "y": [1]}, {"x": torch.tensor([[2, 3]]), "y": [2]}])
        {'x': tensor([[1, 0],
                [2, 3]]), 'y': [1, 2]}
    """
    shared = [name for name in pieces[0] if name != SEGMENTS and all(name in piece for piece in pieces)]
    return {name: _join([piece[name] for piece in pieces]) for name in shared}


def cut_as(batch: Mapping[str, Any], pieces: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cuts a batch at the places where some pieces of as many rows begin and end.

    Args:
        batch: A dictionary of row tensors and lists.
        pieces: What it is cut like; some may have no row.
    """
    ends = list(accumulate(map(count_rows, pieces)))
    return [_select(batch, slice(start, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def count_rows(batch: Mapping[str, Any]) -> int:
    """How many rows a batch has.

    Raises:
        ValueError: If two entries have another number of rows, or none has rows.
    """
    lengths = {name: len(value) for name, value in batch.items() if name != SEGMENTS and _has_rows(value)}
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"a batch that is cut into micro-batches needs entries of one number of rows; found: {found}")
    return next(iter(lengths.values()))


def _join(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, list):
        return [entry for part in parts for entry in part]
    if not _has_rows(first):
        return first
    if first.dim() == 2:
        width = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, width - part.shape[1])) for part in parts]
    return torch.cat(parts)


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)


def _select(batch: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value[rows] if _has_rows(value) else value for name, value in batch.items() if name != SEGMENTS}
