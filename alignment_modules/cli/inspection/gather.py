"""Looks at the batches of a data module: some rows token by token, and an epoch in numbers."""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from alignment_modules.cli.inspection.findings import Inspection, Passage, Row, Sizes
from alignment_modules.cli.inspection.tokens import printable, readable
from alignment_modules.training.pieces import count_tokens

ENDLESS = 100
"""Batches that are looked at of a loader that does not tell how many it has."""

Part = tuple[str, Tensor, Tensor, Tensor]  # name; ids, mask of real tokens, mask of targets, each [rows, time]


def inspect_datamodule(datamodule: LightningDataModule, tokenizer: Any, rows: int = 5) -> Inspection:
    """Prepares a data module, and reads its training rows once.

    Args:
        datamodule: Its batches are those of one of the paradigms.
        tokenizer: Turns ids into text; None: ids are shown.
        rows: How many to show, in the order of training.

    Returns:
        Rows and sizes; `reports` where the data module keeps some.

    Raises:
        ValueError: If a row cannot be used, or a batch holds nothing that can be shown.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    return read_epoch(datamodule, lambda batch, count: rows_of(batch, tokenizer, count), rows)


def read_epoch(
    datamodule: LightningDataModule,
    show: Callable[[dict[str, Any], int], list[Row]],
    rows: int,
    *,
    limit: int | None = None,
    check: Callable[[dict[str, Any]], None] = lambda batch: None,
) -> Inspection:
    """Reads the training batches of the first epoch of a data module that is set up.

    Args:
        datamodule: The data module.
        show: Makes the first rows of a batch, so many at most.
        rows: How many to show.
        limit: Most batches of an epoch; None: all.
        check: Called with each batch.

    Raises:
        ValueError: If a batch holds nothing that can be shown, or what `check` raises.
    """
    loader = datamodule.train_dataloader()
    known = hasattr(loader, "__len__")
    tally, shown = _Tally(getattr(datamodule, "max_length", None)), list[Row]()
    for batch in islice(loader, limit if limit is not None or known else ENDLESS):
        check(batch)
        tally.add(batch)
        if len(shown) < rows:
            shown += show(batch, rows - len(shown))
    return Inspection(
        title=type(datamodule).__name__,
        rows=tuple(shown),
        sizes=tally.sizes(complete=known),
        reports=dict(getattr(datamodule, "reports", {})),
        max_length=getattr(datamodule, "max_length", None),
    )


def rows_of(batch: Mapping[str, Any], tokenizer: Any, count: int) -> list[Row]:
    """The first rows of a batch, token by token.

    Args:
        batch: The batch.
        tokenizer: Turns ids into text; None: ids are shown.
        count: How many, at most.

    Raises:
        ValueError: If the batch holds none of the keys that a paradigm reads.
    """
    parts, positions = parts_of(batch), batch.get("position_ids")
    rows = list[Row]()
    for number in range(min(count, len(parts[0][1]))):
        passages = list[Passage]()
        for name, ids, mask, targets in parts:
            kept = mask[number].bool()
            own, learnt = ids[number][kept].tolist(), targets[number][kept].tolist()
            starts = _starts(positions, number, kept)
            ends = [*starts[1:], len(own)]
            texts = tuple(readable(tokenizer, own[a:b], learnt[a:b]) for a, b in zip(starts, ends, strict=True))
            passages.append(Passage(name, texts, len(own), sum(map(bool, learnt))))
        rows.append(Row(_title(batch, number), tuple(passages), _columns(batch, number)))
    return rows


def parts_of(batch: Mapping[str, Any]) -> list[Part]:
    """What a batch holds of text, by name.

    Raises:
        ValueError: If it holds none of the keys that a paradigm reads.
    """
    if "input_ids" in batch:
        ids = batch["input_ids"]
        return [("", ids, batch.get("attention_mask", torch.ones_like(ids)), batch["labels"] != -100)]
    names = [name for name in ("prompt", "chosen", "rejected", "completion") if f"{name}_input_ids" in batch]
    parts = [
        (name, batch[f"{name}_input_ids"], mask := batch[f"{name}_attention_mask"], _learnt(batch, name, mask))
        for name in names
    ]
    if "prompts" in batch:
        mask = batch["prompt_attention_mask"]
        parts.append(("prompt", batch["prompts"], mask, torch.zeros_like(mask)))
    if not parts:
        raise ValueError(f"a batch holds {sorted(map(str, batch))}; none of these is a text that can be shown")
    return parts


def _learnt(batch: Mapping[str, Any], name: str, mask: Tensor) -> Tensor:
    if name == "prompt":
        return torch.zeros_like(mask)
    return mask.bool() & batch.get(f"{name}_loss_mask", mask).bool()


def _starts(positions: Tensor | None, number: int, kept: Tensor) -> list[int]:
    """Where documents begin among a row's real tokens."""
    if positions is None:
        return [0]
    found = (positions[number][kept] == 0).nonzero().flatten().tolist()
    return found if found[:1] == [0] else [0, *found]


def _title(batch: Mapping[str, Any], number: int) -> str:
    return f"row {batch['index'][number]} of the source" if "index" in batch else ""


def _columns(batch: Mapping[str, Any], number: int) -> dict[str, str]:
    """What else a row brings: its label, its margin, and the columns that reach the rewards."""
    found = dict[str, str]()
    if "label" in batch:
        found["label"] = "desirable" if bool(batch["label"][number]) else "undesirable"
    if "loss_weights" in batch:
        found["weights of targets"] = _weights(batch["loss_weights"][number][batch["labels"][number] != -100])
    if "margin" in batch:
        found["margin"] = f"{float(batch['margin'][number]):g}"
    for name, values in batch.items():
        if isinstance(values, list) and name not in ("index", "prompt"):
            found[printable(name)] = printable(str(values[number]))
    return found


def _weights(weights: Tensor) -> str:
    """Weights of a row's targets, those of equal neighbours as one, with their number."""
    found, counts = weights.unique_consecutive(return_counts=True)
    runs = zip(found.tolist(), counts.tolist(), strict=True)
    return printable(", ".join(f"{weight:g} ({count} tokens)" for weight, count in runs))


class _Tally:
    """Adds up batches."""

    def __init__(self, max_length: int | None) -> None:
        self.max_length, self.packed = max_length, False
        self.batches = self.rows = self.tokens = self.targets = self.padding = self.most_rows = self.largest = 0
        self.lengths: list[int] = []

    def add(self, batch: Mapping[str, Any]) -> None:
        parts = parts_of(batch)
        rows = len(parts[0][1])
        counts = {key: int(value) for key, value in count_tokens(batch).items()}
        self.batches, self.rows = self.batches + 1, self.rows + rows
        self.tokens, self.padding = self.tokens + counts["tokens"], self.padding + counts["padding"]
        self.targets += sum(int(targets.sum()) for _, _, _, targets in parts)
        self.largest = max(self.largest, counts["tokens"] + counts["padding"])
        self.most_rows = max(self.most_rows, rows)
        self.packed |= "position_ids" in batch
        self.lengths += self._lengths(batch, parts, rows)

    def _lengths(self, batch: Mapping[str, Any], parts: list[Part], rows: int) -> list[int]:
        if "position_ids" not in batch:
            prompt = torch.zeros(rows, dtype=torch.long)
            sides = list[Tensor]()
            for name, _, mask, _ in parts:
                if name == "prompt":
                    prompt = mask.sum(dim=1)
                else:
                    sides.append(mask.sum(dim=1))
            longest = torch.stack(sides).amax(dim=0) if sides else torch.zeros_like(prompt)
            return (prompt + longest).tolist()
        found = list[int]()
        for number in range(rows):
            kept = parts[0][2][number].bool()
            starts = _starts(batch["position_ids"], number, kept)
            found += [b - a for a, b in zip(starts, [*starts[1:], int(kept.sum())], strict=True)]
        return found

    def sizes(self, *, complete: bool) -> Sizes:
        places = self.rows * self.max_length if self.packed and self.max_length is not None else None
        return Sizes(
            batches=self.batches,
            rows=self.rows,
            tokens=self.tokens,
            targets=self.targets,
            padding=self.padding,
            most_rows=self.most_rows,
            largest=self.largest,
            lengths=tuple(self.lengths),
            packed_into=places,
            complete=complete,
        )
