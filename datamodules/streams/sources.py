"""What a stream comes from: files, saved folders, hub ids, and iterable data sets."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import IterableDataset

from datamodules.rows.rows import parse_line
from datamodules.rows.sources import find_path, folder_files, hub_split, is_hub_id, not_found, open_saved
from datamodules.streams.tapes import Deal, IterableTape, LinesTape, ParquetTape, Row, Tape, checksum_of, open_parquet

SUFFIXES = (".jsonl", ".ndjson", ".txt", ".parquet")


class StreamSource(Protocol):
    """Rows that can be read from their beginning, again and again, and from any position of a tape of theirs."""

    name: str

    def open(self, deal: Deal, turn: int = 0, position: Mapping[str, Any] | None = None) -> Tape:
        """A pass over one shard's rows.

        Args:
            deal: The shard.
            turn: Which pass, from 0; an iterable that draws an order draws that of this epoch.
            position: Where to begin: what a tape of the same deal and pass said.
        """
        ...

    def where(self, mark: tuple[int, int]) -> str:
        """Describes the place of a row, by the mark that its tape gave it."""
        ...


class FileSource:
    """Rows of JSON Lines, text or Parquet files, all of one kind.

    Args:
        paths: The files, in order.
        name: What messages call them.
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.paths, self.name = list(paths), name
        self.suffix = self.paths[0].suffix.lower()

    def open(self, deal: Deal, turn: int = 0, position: Mapping[str, Any] | None = None) -> Tape:
        """A pass over one shard's rows; all passes are alike."""
        if self.suffix == ".parquet":
            return ParquetTape(self.paths, deal, position)
        return LinesTape(self.paths, _text_line if self.suffix == ".txt" else parse_line, deal, position)

    def where(self, mark: tuple[int, int]) -> str:
        """`path:line`, or the number of a row within its Parquet file."""
        path = self.paths[mark[0]]
        return f"row {mark[1]} of {path}" if self.suffix == ".parquet" else f"{path}:{mark[1]}"


def _text_line(path: Path, raw: bytes, line: int) -> Row:
    try:
        return {"text": raw.decode("utf-8-sig").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {error.start})") from None


class IterableSource:
    """Rows of a torch `IterableDataset` of mappings, or of a `datasets.IterableDataset`.

    Rows are dealt by their numbers, and those of a `datasets.IterableDataset` by whole files where it has as many
    (`num_shards`) as there are shards. A data set's `state_dict` and `load_state_dict` are used where it has them (a
    position is else found by reading on from the first row), and its `set_epoch` tells it which pass it is.

    Args:
        rows: The data set. Each call of `iter` begins with its first row, in any process.
        name: What messages call it.

    Raises:
        ValueError: `iter` gives the same iterator twice.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.rows, self.name, self._expected = rows, name, list[int]()
        if iter(rows) is iter(rows):
            raise ValueError(
                f"{name} gives one iterator for ever, and each pass needs one from the first row on; make __iter__ "
                "return a new one, or be a generator function"
            )

    def expect(self, rows: Sequence[Row]) -> None:
        """Has every first pass checked: it must begin with these rows, in whatever process.

        Args:
            rows: The first rows, as one process has read them.
        """
        self._expected = [checksum_of(row) for row in rows]

    def open(self, deal: Deal, turn: int = 0, position: Mapping[str, Any] | None = None) -> Tape:
        """A pass over one shard's rows."""
        rows, number = self._own_copy(), 0
        dealt = is_datasets_stream(rows) and rows.num_shards >= deal.shards > 1
        if dealt:
            rows = rows.shard(num_shards=deal.shards, index=deal.shard)
        if hasattr(rows, "set_epoch"):
            rows.set_epoch(turn)
        stateful = hasattr(rows, "state_dict") and hasattr(rows, "load_state_dict")
        if position and "state" in position and stateful:
            rows.load_state_dict(position["state"])
            number = int(position["number"])
        place = partial(self._place, deal if dealt else Deal())
        state = rows.state_dict if stateful else None
        expected = () if dealt or turn else self._expected
        tape = IterableTape(_iterate(rows), state, deal, whole=not dealt, number=number, place=place, expected=expected)
        tape.skip(int((position or {}).get("number", 0)))
        return tape

    def where(self, mark: tuple[int, int]) -> str:
        """The number of the row."""
        return f"row {mark[1]} of {self.name}"

    def _place(self, deal: Deal, number: int) -> str:
        part = "" if deal.shards == 1 else f"part {deal.shard} of {deal.shards} of "
        return f"row {number} of {part}{self.name}"

    def _own_copy(self) -> Any:
        """The data set, copied where it holds a position or an epoch: shards of one process have one each."""
        if hasattr(self.rows, "state_dict") or hasattr(self.rows, "set_epoch"):
            try:
                return copy.deepcopy(self.rows)
            except Exception as error:  # whatever its parts raise
                raise ValueError(
                    f"{self.name} has state_dict or set_epoch, so that each shard needs a copy of its own, but copying "
                    f"it fails: {type(error).__name__}: {error}"
                ) from error
        return self.rows


def _iterate(rows: Any) -> Iterator[Any]:
    if not is_datasets_stream(rows):
        return iter(rows)
    # `iter(rows)` would deal the rows to the workers of a loader once more
    return ({name: values[0] for name, values in batch.items()} for batch in rows.iter(batch_size=1))


def is_datasets_stream(source: Any) -> bool:
    """Whether a source is a `datasets.IterableDataset`; looked up without importing `datasets`."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, datasets.IterableDataset)


def is_stream(source: Any) -> bool:
    """Whether a source is an iterable data set, which has no length."""
    return is_datasets_stream(source) or isinstance(source, IterableDataset)


def open_stream(source: Any, split: str) -> StreamSource:
    """Open whatever the user gave as a stream of rows.

    Args:
        source: A path (JSON Lines, text, Parquet; a folder of such files, or one saved by `datasets`), a hub id, a
            `datasets.IterableDataset` or `datasets.Dataset`, or a torch `IterableDataset` of mappings.
        split: "train", "validation", "test" or "predict".

    Raises:
        ValueError: The source does not exist, or cannot be read as a stream.
    """
    if isinstance(source, (str, Path)):
        return _open_path(str(source), split)
    name = f"the {type(source).__name__} given as {split}"
    if is_stream(source):
        return IterableSource(source, name)
    if hasattr(source, "to_iterable_dataset"):
        return IterableSource(source.to_iterable_dataset(), name)
    raise ValueError(
        f"{split}={type(source).__name__} with stream=...: it has a length and is in memory already; leave stream out, "
        "or give a path, a hub id or an IterableDataset"
    )


def _open_path(source: str, split: str) -> StreamSource:
    path, chosen = find_path(source)
    if not path.exists():
        if is_hub_id(source):
            return IterableSource(hub_split(source, split, streaming=True), source)
        raise ValueError(not_found(source, split))
    saved = open_saved(path, chosen, split) if path.is_dir() else None
    if saved is not None:
        return IterableSource(saved.to_iterable_dataset(), str(path))
    paths = folder_files(path, chosen, split) if path.is_dir() else [path]
    if (suffix := paths[0].suffix.lower()) not in SUFFIXES:
        raise ValueError(
            f"{split}={source!r}: a file of the kind {suffix!r} cannot be read as a stream, but {', '.join(SUFFIXES)} "
            "can; leave stream out, or write it as JSON Lines"
        )
    if suffix == ".parquet":
        for file in paths:
            open_parquet(file)
    return FileSource(paths, str(path))
