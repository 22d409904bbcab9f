"""A table made in parts: ranges of rows, each by the data module's own `build`, then joined on disk."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.batching import Ragged, TokenTable, pack
from datamodules.cache.arrays import file_checksum, open_array, write_array
from datamodules.cache.forms import (
    Pieces,
    collate_facts,
    join_facts,
    missing,
    put_together,
    take_apart,
    with_fingerprint,
)
from datamodules.cache.workers import in_processes
from datamodules.lengths import how_long
from datamodules.progress import Progress, lost
from datamodules.reading import Batches, SplitReader
from datamodules.tables import PromptTable

ROWS_OF_A_PART = 8192
_JOIN = -1  # the piece that joins the parts


class Building:
    """Makes a table in a folder.

    Args:
        reader: The rows.
        build: Makes the table of a reader's rows.
        processes: How many processes tokenise.
        explained: Makes an error of writing one that says what to do.
    """

    def __init__(
        self,
        reader: SplitReader,
        build: Callable[[SplitReader], Batches],
        processes: int,
        explained: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.reader, self.build, self.processes, self.explained = reader, build, processes, explained
        self.folder = Path()

    def make(self, folder: Path) -> dict[str, Any]:
        """Makes it; parts that an earlier try left there are taken over.

        Args:
            folder: Gets the arrays.

        Returns:
            Plain values: the table's, what makes its batches, the report, lengths, and what was said on the way.

        Raises:
            ValueError: A row cannot be used, or none is left; of several the first.
            UnknownForm: The table is of a class of the user's.
        """
        self.folder = folder
        with self.explained():
            (folder / "parts").mkdir(exist_ok=True)
        starts = list(range(0, len(self.reader.rows), ROWS_OF_A_PART))
        total = Counter[str]()
        with Progress(self.reader.split, len(self.reader.rows), self.reader.bar) as progress:
            for number, report in in_processes(self._part, starts, self.processes):
                total += lost(report)
                progress.add(min(ROWS_OF_A_PART, len(self.reader.rows) - starts[number]), total)
        ((_, facts),) = in_processes(self._join, [starts], 1)
        return dict(facts)

    def _place(self, start: int) -> Path:
        return self.folder / "parts" / f"{start:012d}"

    def _part(self, start: int) -> dict[str, Any]:
        """Makes the part that begins with a row, unless it is there; gives its report."""
        place = self._place(start)
        if (done := _read_part(place)) is not None:
            return dict(done["report"])
        part = self.reader.part(start, min(start + ROWS_OF_A_PART, len(self.reader.rows)))
        with _kept_messages() as messages:
            table, collate = self.build(part)
        pieces = take_apart(table)
        facts = {
            "table": pieces.facts,
            "collate": collate_facts(collate),
            "report": part.report,
            "counted": list(part.counted),
            "packing": part.packing,
            "messages": messages,
            "ragged": list(pieces.ragged),
            "arrays": list(pieces.arrays),
        }
        unfinished = place.with_suffix(".unfinished")
        with self.explained():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            for name, array in _arrays_of(pieces, part.lengths):
                write_array(unfinished / f"{name}.npy", [array], array.dtype, len(array))
            files = {file.name: file_checksum(file) for file in unfinished.iterdir()}
            (unfinished / "part.json").write_text(json.dumps(facts | {"files": files}), encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)
            unfinished.rename(place)
        return part.report

    def _join(self, starts: Sequence[int]) -> dict[str, Any]:
        """Joins the parts into the arrays of the whole table."""
        places = [self._place(start) for start in starts]
        parts = [json.loads((place / "part.json").read_text(encoding="utf-8")) for place in places]
        reader, packing = copy.copy(self.reader), any(part["packing"] for part in parts)
        counted = {name for part in parts for name in part["counted"]}
        reader.report = _join_reports([part["report"] for part in parts], counted)
        facts = join_facts([part["table"] for part in parts])
        lengths = np.concatenate([open_array(place / "_lengths.npy") for place in places])
        with self.explained():
            pieces = _join_arrays(self.folder, places, parts, without={"source_rows"} if packing else set())
        pieces.facts = facts
        table = put_together(pieces, reader.rows)
        if isinstance(table, PromptTable):
            reader.check_columns(table.source)
        reader.check_not_empty(len(table))
        if packing and isinstance(table, TokenTable):
            bins = pack(table.tokens.lengths, reader.max_length)
            table = TokenTable(table.tokens, bins, table.weights)
            reader.report["packed_rows"] = len(table)
            if table.bins is not None:
                with self.explained():
                    _write_ragged(self.folder, "bins", table.bins)
                pieces.ragged["bins"] = table.bins
        return {
            "table": with_fingerprint(facts, table),
            "collate": parts[0]["collate"],
            "ragged": list(pieces.ragged),
            "arrays": list(pieces.arrays),
            "report": reader.report,
            "how_long": list(how_long(lengths, reader.max_length)),
            "messages": list(dict.fromkeys(tuple(message) for part in parts for message in part["messages"])),
        }


def open_pieces(facts: dict[str, Any], array: Callable[[str], np.ndarray]) -> Pieces:
    """What a table is made of, of the plain values that `Building.make` gives and its arrays.

    Args:
        facts: The plain values.
        array: Opens an array by its name.
    """
    ragged = {name: Ragged.of(array(f"{name}_values"), array(f"{name}_offsets")) for name in facts["ragged"]}
    return Pieces(facts["table"], ragged, {name: array(name) for name in facts["arrays"]})


def _arrays_of(pieces: Pieces, lengths: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for name, ragged in pieces.ragged.items():
        yield f"{name}_values", ragged.values
        yield f"{name}_offsets", ragged.offsets
    yield from pieces.arrays.items()
    yield "_lengths", lengths


def _read_part(place: Path) -> dict[str, Any] | None:
    """What a part noted; None where it is not there, or not whole."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        facts: dict[str, Any] = json.loads((place / "part.json").read_text(encoding="utf-8"))
        if all(file_checksum(place / name) == checksum for name, checksum in facts["files"].items()):
            return facts
    return None


def _join_reports(reports: Sequence[dict[str, Any]], counted: set[str]) -> dict[str, Any]:
    """The counts of all parts in the order in which one reader would have taken them: row by row first."""
    joined: dict[str, Any] = {}
    first = [name for name in reports[0] if name in ("rows", "format")]
    by_row = [name for report in reports for name in report if name in counted]
    for name in dict.fromkeys((*first, *by_row, *(name for report in reports for name in report))):
        found = [report[name] for report in reports if name in report]
        if name == "longest":
            joined[name] = max(found)
        else:
            joined[name] = sum(found) if all(isinstance(one, int) for one in found) else found[0]
    return joined


def _join_arrays(folder: Path, places: Sequence[Path], parts: Sequence[dict[str, Any]], without: set[str]) -> Pieces:
    """Writes each array of the parts one behind the other, and maps it."""

    def opened(part: int) -> Pieces:
        return open_pieces(parts[part], lambda name: open_array(places[part] / f"{name}.npy"))

    joined, numbers = Pieces({}), range(len(parts))
    for name in dict.fromkeys(name for part in parts for name in part["ragged"]):

        def of(part: int, name: str = name) -> Ragged:
            found = opened(part).ragged
            return found[name] if name in found else missing(name, found)

        ends = np.cumsum([0, *(len(of(part).values) for part in numbers)])
        rows, dtype = sum(len(of(part)) for part in numbers), of(0).values.dtype
        values, offsets = folder / f"{name}_values.npy", folder / f"{name}_offsets.npy"
        write_array(values, (of(part).values for part in numbers), dtype, int(ends[-1]))
        begins = (of(part).offsets[:-1] + ends[part] for part in numbers)
        write_array(offsets, _behind(begins, ends[-1:]), np.int64, rows + 1)
        joined.ragged[name] = Ragged.of(open_array(values), open_array(offsets))
    for name in dict.fromkeys(name for part in parts for name in part["arrays"] if name not in without):
        arrays = [open_array(place / f"{name}.npy") for place in places]
        write_array(folder / f"{name}.npy", arrays, arrays[0].dtype, sum(map(len, arrays)))
        joined.arrays[name] = open_array(folder / f"{name}.npy")
    return joined


def _behind(arrays: Iterator[np.ndarray], last: np.ndarray) -> Iterator[np.ndarray]:
    yield from arrays
    yield last


def _write_ragged(folder: Path, name: str, ragged: Ragged) -> None:
    for what, array in (("values", ragged.values), ("offsets", ragged.offsets)):
        write_array(folder / f"{name}_{what}.npy", [array], array.dtype, len(array))


@contextlib.contextmanager
def _kept_messages() -> Iterator[list[list[Any]]]:
    """Collects what is said to the log, to be said once for all parts: name, level and text of each."""
    package, kept = logging.getLogger("datamodules"), list[list[Any]]()

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append([record.name, record.levelno, record.getMessage()])

    handlers, package.handlers, passes, package.propagate = package.handlers, [Keep()], package.propagate, False
    try:
        yield kept
    finally:
        package.handlers, package.propagate = handlers, passes
