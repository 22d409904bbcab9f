"""Where rows come from: files, saved folders, hub ids, sequences and torch datasets, all as one indexable `Rows`."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
# The split that a hub id or a saved dictionary of splits is read from when none is named.
DEFAULT_SPLITS = {"train": "train", "validation": "validation", "test": "test", "predict": "test"}


class Rows(Protocol):
    """An indexable table of rows; `where` says in words where a row stands, for error messages."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def where(self, index: int) -> str:
        """Describe the place of row `index` ("data.jsonl:17" or "row 17 of [...]")."""
        ...


class SequenceRows:
    """Rows of anything with `__len__` and `__getitem__`: a list, a torch map-style Dataset, a `datasets.Dataset`.

    Args:
        rows: The rows, each a mapping from column name to value.
        name: What error messages call the source.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.rows = rows
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{self.where(index)} is a {type(row).__name__}; every row must be a mapping from column name to value"
            )
        return dict(row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """Describe the place of row `index`."""
        return f"row {index} of {self.name}"


class JsonlRows:
    """A JSON Lines file that stays on disk: every line is checked once, then rows are parsed when asked for.

    Blank lines are skipped. Only line offsets are held in memory (8 bytes a row), and no column types are unified, so
    rows may have different columns.

    Args:
        path: The file.

    Raises:
        ValueError: A line is not valid UTF-8 or JSON, or not an object; the message starts with `path:line`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        offsets, lines, offset = [], [], 0
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    self._parse(raw, number)
                    offsets.append(offset)
                    lines.append(number)
                offset += len(raw)
        self._offsets = np.asarray(offsets, dtype=np.int64)
        self._lines = np.asarray(lines, dtype=np.int64)

    def _parse(self, raw: bytes, line: int) -> dict[str, Any]:
        try:
            row = json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}:{line}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.path}:{line}: not valid JSON: {error.msg} at column {error.colno}; "
                "each line must hold one JSON object"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{self.path}:{line}: holds a JSON {type(row).__name__}; each line must hold one JSON object "
                'such as {"prompt": ..., "completion": ...}'
            )
        return row

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[index]))
            return self._parse(file.readline(), int(self._lines[index]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield self._parse(raw, number)

    def where(self, index: int) -> str:
        """Describe the place of row `index` as `path:line`."""
        return f"{self.path}:{int(self._lines[index])}"


class ConcatRows:
    """Several tables one after the other.

    Args:
        parts: The tables, in order.
        name: What error messages call the whole.
    """

    def __init__(self, parts: Sequence[Rows], name: str) -> None:
        self.parts = list(parts)
        self.name = name
        self._ends = np.cumsum([len(part) for part in self.parts])

    def _locate(self, index: int) -> tuple[Rows, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part], index - (int(self._ends[part - 1]) if part else 0)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows, index = self._locate(index)
        return rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part in self.parts:
            yield from part

    def where(self, index: int) -> str:
        """Describe the place of row `index` in its own part."""
        rows, index = self._locate(index)
        return rows.where(index)


class RenamedRows:
    """Rows with some columns under other names.

    Args:
        rows: The rows.
        names: New name of each old one.

    Raises:
        ValueError: The first row lacks a column that is to be renamed.
    """

    def __init__(self, rows: Rows, names: Mapping[str, str]) -> None:
        self.rows, self.names, self.name = rows, dict(names), rows.name
        unknown = sorted(set(names) - set(rows[0]))
        if unknown:
            raise ValueError(f"columns={dict(names)}: {rows.name} has no column {unknown}; found {sorted(rows[0])}")

    def __len__(self) -> int:
        return len(self.rows)

    def _rename(self, row: dict[str, Any]) -> dict[str, Any]:
        new = set(self.names.values())
        kept = {name: value for name, value in row.items() if name not in self.names and name not in new}
        return {**kept, **{self.names[name]: row[name] for name in self.names if name in row}}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rename(self.rows[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._rename, self.rows)

    def where(self, index: int) -> str:
        """Describe the place of row `index`."""
        return self.rows.where(index)


def open_source(source: Any, split: str) -> Rows:
    """Open whatever the user gave as the rows of one split.

    Args:
        source: A path (JSONL, JSON, CSV, TSV, Parquet, text; a folder of such files; a folder saved by `datasets`), a
            hub id (`owner/name`, `owner/name@config`, either with `:split` at its end), a torch map-style Dataset of
            dict rows, a `datasets.Dataset` or `DatasetDict`, or any sequence of dict rows.
        split: "train", "validation", "test" or "predict": names the parameter in errors and picks the split of a
            source that has several.

    Raises:
        ValueError: The source does not exist, cannot be read, cannot be indexed, or has no rows.
    """
    is_name = isinstance(source, (str, Path))
    rows = _open_path_or_hub(str(source), split) if is_name else _open_object(source, split)
    if len(rows) == 0:
        raise ValueError(f"{split}={rows.name!r} has no rows; at least one is needed")
    return rows


def is_hub_id(source: Any) -> bool:
    """Whether a source names a hub data set: no such path here, and it does not look like one."""
    if not isinstance(source, str) or Path(source).expanduser().exists():
        return False
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or source.lower().endswith(SUFFIXES)
    return not looks_like_path and source != ""


def load_from_hub(source: str, split: str) -> Rows:
    """Load a hub data set (`owner/name[@config][:split]`), from the local cache where it is there.

    Raises:
        ValueError: It cannot be loaded, or has no such split.
    """
    import datasets

    identifier, _, chosen = source.partition(":")
    identifier, _, config = identifier.partition("@")
    try:
        loaded = datasets.load_dataset(identifier, config or None)
    except Exception as error:  # the hub client raises many unrelated classes
        raise ValueError(
            f"{split}={source!r} is no file or folder here, and loading it as a hub data set failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    return SequenceRows(_pick_split(loaded, chosen, split, source), source)


def _pick_split(loaded: Mapping[str, Any], chosen: str, split: str, name: str) -> Any:
    wanted = chosen or DEFAULT_SPLITS[split]
    if wanted not in loaded:
        raise ValueError(
            f"{split}={name!r} has no split {wanted!r}; it has {sorted(loaded)}. Name one: '{name.partition(':')[0]}:"
            f"{sorted(loaded)[0]}'"
        )
    return loaded[wanted]


def _open_object(source: Any, split: str) -> Rows:
    name = f"the {type(source).__name__} given as {split}"
    if type(source).__name__ == "DatasetDict" and isinstance(source, Mapping):
        source = _pick_split(source, "", split, name)
    if isinstance(source, Mapping) or not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise ValueError(
            f"{split}={type(source).__name__} cannot be used: a source needs __len__ and __getitem__ (a map-style "
            "Dataset, a list of dict rows) or must be a path or hub id; streams without a length are not supported"
        )
    return SequenceRows(source, name)


def _open_path_or_hub(source: str, split: str) -> Rows:
    location, _, chosen = source.rpartition(":") if ":" in source else (source, "", "")
    path = Path(source).expanduser()
    if not path.exists() and location and Path(location).expanduser().is_dir():
        path = Path(location).expanduser()  # a saved folder with ":split" at its end
    else:
        chosen = ""
    if path.is_dir():
        return _open_folder(path, chosen, split)
    if path.is_file():
        return _open_file(path, split)
    if is_hub_id(source):
        return load_from_hub(source, split)
    raise ValueError(f"{split}={source!r}: no such file or folder (looked in {Path.cwd()})")


def _open_folder(path: Path, chosen: str, split: str) -> Rows:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        import datasets

        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            loaded = _pick_split(loaded, chosen, split, str(path))
        return SequenceRows(loaded, str(path))
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) != 1:
        raise ValueError(
            f"{split}={str(path)!r}: the folder must be one saved by `datasets` or hold data files of one kind "
            f"({', '.join(SUFFIXES)}); found {kinds or 'none'}"
        )
    return ConcatRows([_open_file(file, split) for file in files], str(path))


def _open_file(path: Path, split: str) -> Rows:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return JsonlRows(path)
    if suffix == ".json":
        return _open_json(path)
    if suffix in (".csv", ".tsv"):
        return SequenceRows(_read_csv(path, "\t" if suffix == ".tsv" else ","), str(path))
    if suffix == ".parquet":
        import datasets

        try:
            return SequenceRows(datasets.Dataset.from_parquet(str(path)), str(path))
        except Exception as error:  # pyarrow and datasets raise unrelated classes
            raise ValueError(f"{split}={str(path)!r} is not a readable Parquet file: {error}") from error
    if suffix == ".txt":
        lines = _read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return SequenceRows([{"text": line} for line in lines if line.strip()], str(path))
    raise ValueError(f"{split}={str(path)!r}: unknown kind of file {suffix!r}; known: {', '.join(SUFFIXES)}")


def _read_text(path: Path) -> str:
    """Content of a UTF-8 file, line ends as they are, without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1)
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {column})") from None


def _open_json(path: Path) -> Rows:
    text = _read_text(path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().splitlines()[0].strip() if text.strip() else ""
        if first.startswith("{") and first.endswith("}"):
            return JsonlRows(path)  # JSON Lines under the suffix .json is common
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    if isinstance(data, dict) and "data" in data:
        data = data["data"]
    if isinstance(data, dict):
        data = [data]
    if not isinstance(data, list):
        raise ValueError(f"{path}: holds a JSON {type(data).__name__}; a list of objects is needed")
    return SequenceRows(data, str(path))


def _read_csv(path: Path, delimiter: str) -> list[dict[str, str]]:
    # Every value stays a string: "007" and "1.0" must not turn into numbers that a verifier then compares.
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # documents are longer than the default of 131,072 characters
    try:
        header = next(reader, None) or []
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise ValueError(f"{path}:{reader.line_num}: the header names {repeated} more than once: {header}")
        rows = []
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}:{reader.line_num}: {len(fields)} fields, the header has {len(header)}: {header}"
                )
            rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return rows
