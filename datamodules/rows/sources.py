"""Where rows come from: files, saved folders, hub ids, sequences and torch datasets, all as one indexable `Rows`."""

from __future__ import annotations

import difflib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.rows.arrow import DatasetRows, ParquetRows
from datamodules.rows.identity import identity_of_file, identity_of_folder
from datamodules.rows.keeping import Keeper, KeepNothing
from datamodules.rows.rows import ConcatRows, JsonlRows, Rows, SequenceRows
from datamodules.rows.splits import named_splits, split_files
from datamodules.rows.strict_json import find_line, strict_json
from datamodules.rows.text_files import CsvRows, TextRows, read_text

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
# The split that a hub id or a saved dictionary of splits is read from when none is named.
DEFAULT_SPLITS = {"train": "train", "validation": "validation", "test": "test", "predict": "test"}


def open_source(source: Any, split: str, keeper: Keeper | None = None) -> Rows:
    """Open whatever the user gave as the rows of one split.

    Args:
        source: A path (JSONL, JSON, CSV, TSV, Parquet, text; a folder of such files; a folder saved by `datasets`), a
            hub id (`owner/name`, `owner/name@config`, either with `:split` at its end), a torch map-style Dataset of
            dict rows, a `datasets.Dataset` or `DatasetDict`, or any sequence of dict rows.
        split: "train", "validation", "test" or "predict": names the parameter in errors and picks the split of a
            source that has several.
        keeper: Keeps what is found out about files; None: nothing is kept.

    Raises:
        ValueError: The source does not exist, cannot be read, cannot be indexed, or has no rows.
    """
    is_name = isinstance(source, (str, Path))
    rows = _open_path_or_hub(str(source), split, keeper or KeepNothing()) if is_name else _open_object(source, split)
    if len(rows) == 0:
        raise ValueError(f"{split}={rows.name!r} has no rows; at least one is needed")
    return rows


def is_hub_id(source: Any) -> bool:
    """Whether a source names a hub data set: no such path here, and it does not look like one."""
    if not isinstance(source, str) or Path(source).expanduser().exists():
        return False
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or source.lower().endswith(SUFFIXES)
    return not looks_like_path and source != ""


def has_validation(source: Any) -> bool:
    """Whether a training source is a folder that has rows for validation, too."""
    if not isinstance(source, str) or not Path(source).expanduser().is_dir():
        return False
    saved = Path(source).expanduser() / "dataset_dict.json"
    if saved.exists():
        return "validation" in json.loads(saved.read_text(encoding="utf-8")).get("splits", [])
    return "validation" in split_files(Path(source).expanduser(), SUFFIXES)


def load_from_hub(source: str, split: str) -> Rows:
    """Load a hub data set (`owner/name[@config][:split]`), from the local cache where it is there.

    Raises:
        ValueError: It cannot be loaded, or has no such split.
    """
    picked = hub_split(source, split)
    files = [identity_of_file(Path(file["filename"])) for file in picked.cache_files]
    return DatasetRows(picked, source, files or None)


def hub_split(source: str, split: str, *, streaming: bool = False) -> Any:
    """A split of a hub data set: a `datasets.Dataset` or, to be read over the network, an `IterableDataset`.

    Args:
        source: `owner/name[@config][:split]`.
        split: "train", "validation", "test" or "predict".
        streaming: Whether nothing is to be downloaded before it is read.

    Raises:
        ValueError: It cannot be loaded, or has no such split.
    """
    import datasets

    identifier, _, chosen = source.partition(":")
    identifier, _, config = identifier.partition("@")
    try:
        loaded = datasets.load_dataset(identifier, config or None, streaming=streaming)
    except Exception as error:  # the hub client raises many unrelated classes
        raise ValueError(
            f"{split}={source!r} is no file or folder here, and loading it as a hub data set failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _pick_split(loaded, chosen, split, source)


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
            "Dataset, a list of dict rows) or must be a path or hub id. An IterableDataset is a stream of training rows"
        )
    return DatasetRows(source, name) if _is_dataset(source) else SequenceRows(source, name)


def _is_dataset(source: Any) -> bool:
    """Whether it is a `datasets.Dataset`; nothing is imported for that."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, datasets.Dataset)


def find_path(source: str) -> tuple[Path, str]:
    """The path that a source names, which may not exist, and the split that stands behind a folder's."""
    location, _, chosen = source.rpartition(":") if ":" in source else (source, "", "")
    path = Path(source).expanduser()
    if not path.exists() and location and Path(location).expanduser().is_dir():
        return Path(location).expanduser(), chosen
    return path, ""


def _open_path_or_hub(source: str, split: str, keeper: Keeper) -> Rows:
    path, chosen = find_path(source)
    if path.is_dir():
        return _open_folder(path, chosen, split, keeper)
    if path.is_file():
        return _open_file(path, split, keeper)
    if is_hub_id(source):
        return load_from_hub(source, split)
    raise ValueError(not_found(source, split))


def check_sources(sources: Mapping[str, Any], splits: Sequence[str]) -> None:
    """Refuse a path of some splits that is not there, before anything is opened; hub ids are not looked up.

    Raises:
        ValueError: A path does not exist; the message names the split, the path and what is there.
    """
    for split in splits:
        source = sources.get(split)
        if not isinstance(source, str) or is_hub_id(source):
            continue
        if not any(Path(path).expanduser().exists() for path in (source, source.rpartition(":")[0] or source)):
            raise ValueError(not_found(source, split))


def not_found(source: str, split: str) -> str:
    """What to say of a path that is not there."""
    folder = Path(source).expanduser().absolute().parent
    if not folder.is_dir():
        return f"{split}={source!r}: no such file or folder; there is no folder {folder} either"
    there = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(Path(source).name, there, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    more = f" and {len(there) - 10} more" if len(there) > 10 else ""
    return f"{split}={source!r}: no such file or folder{meant}; {folder} holds {there[:10]}{more}"


def open_saved(path: Path, chosen: str, split: str) -> Any:
    """The `datasets.Dataset` that a folder saved by `datasets` holds for a split; None: the folder is none."""
    if not ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        return None
    import datasets

    loaded = datasets.load_from_disk(str(path))
    return _pick_split(loaded, chosen, split, str(path)) if isinstance(loaded, datasets.DatasetDict) else loaded


def folder_files(path: Path, chosen: str, split: str) -> list[Path]:
    """Data files of a folder for a split, all of one kind, in order.

    Args:
        path: The folder.
        chosen: Name of a split; empty: that of `split`, where names of files tell it, else all files.
        split: "train", "validation", "test" or "predict".

    Raises:
        ValueError: There are none, or of several kinds.
    """
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    by_split = split_files(path, SUFFIXES)
    if by_split or chosen:
        wanted = next(iter(named_splits(chosen or DEFAULT_SPLITS[split])), chosen)
        named = {name: [str(file.relative_to(path)) for file in found] for name, found in by_split.items()}
        if wanted not in by_split:
            raise ValueError(
                f"{split}={str(path)!r}: the folder has no file for {wanted!r}; by their names it has {named}. "
                "Give the file itself, or a split as in 'folder:test'"
            )
        left = sorted({file.name for file in files} - {file.name for found in by_split.values() for file in found})
        if left:
            logger.warning("%s from %s: left out, since their names name no split: %s", split, path, left)
        files = by_split[wanted]
        logger.info("%s from %s: its files for %s: %s", split, path, wanted, named[wanted])
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) != 1:
        raise ValueError(
            f"{split}={str(path)!r}: the folder must be one saved by `datasets` or hold data files of one kind "
            f"({', '.join(SUFFIXES)}); found {kinds or 'none'}"
        )
    return files


def _open_folder(path: Path, chosen: str, split: str, keeper: Keeper) -> Rows:
    saved = open_saved(path, chosen, split)
    if saved is not None:
        return DatasetRows(saved, str(path), [identity_of_folder(path), chosen or split])
    return ConcatRows([_open_file(file, split, keeper) for file in folder_files(path, chosen, split)], str(path))


def _open_file(path: Path, split: str, keeper: Keeper) -> Rows:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return JsonlRows(path, keeper)
    if suffix == ".json":
        return _open_json(path, keeper)
    if suffix in (".csv", ".tsv"):
        return CsvRows(path, keeper, "\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return ParquetRows(path, keeper)
    if suffix == ".txt":
        return TextRows(path, keeper)
    raise ValueError(f"{split}={str(path)!r}: unknown kind of file {suffix!r}; known: {', '.join(SUFFIXES)}")


def _open_json(path: Path, keeper: Keeper) -> Rows:
    identity = identity_of_file(path)
    text = read_text(path)
    try:
        data = strict_json(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().splitlines()[0].strip() if text.strip() else ""
        if first.startswith("{") and first.endswith("}"):
            return JsonlRows(path, keeper)  # JSON Lines under the suffix .json is common
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise ValueError(f"{find_line(text, path)}: {error}") from None
    if isinstance(data, dict) and "data" in data:
        data = data["data"]
    if isinstance(data, dict):
        data = [data]
    if not isinstance(data, list):
        raise ValueError(f"{path}: holds a JSON {type(data).__name__}; a list of objects is needed")
    return SequenceRows(data, str(path), identity)
