"""What can be said of a configuration's data before anything is built."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace

import datamodules
from datamodules.rows.sources import check_sources


def check_data(data: Namespace | None, command: str) -> None:
    """Refuses data without rows for a command, and paths of rows that are not there.

    Only data modules of this package are looked at, which take their rows from a source a split and from nowhere else,
    and mixtures of them.

    Args:
        data: The configuration's data module, with `class_path` and `init_args`; None: there is none.
        command: "fit", "validate", "test" or "predict".

    Raises:
        ValueError: There are no rows, or a path does not exist; the message names the option, or source and split.
    """
    split = {"fit": "train", "validate": "validation"}.get(command, command)
    splits = ("train", "validation") if split == "train" else (split,)
    given = dict[str, Any]((data or {}).get("init_args") or {})
    if data is None or not _is_ours(data.class_path):
        return
    sources = dict(options_of_sources(given))
    if dotted := next((name for name in sources if "." in name), None):
        name = dotted.partition(".")[0]
        raise ValueError(
            f"data.sources.{dotted}: a source begins with its data module, as in --data.sources.{name} SFTDataModule "
            f"--data.sources.{name}.train FILE; a weight and the like need a configuration file"
        )
    if sources and not any(options.get(split) is not None for options in sources.values()):
        raise ValueError(
            f"data.sources: `align {command}` needs rows, and none of {', '.join(sources)} has {split} rows; give one "
            f"{split}: ..."
        )
    for name, options in sources.items():
        try:
            check_sources(options, splits)
        except ValueError as error:
            raise ValueError(f"source {name!r}: {error}") from None
    if split in given and given[split] is None:
        raise ValueError(f"data.{split}=None: `align {command}` needs rows; give --data.{split} a source")
    check_sources(given, splits)


def options_of_sources(data: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The name and the data module's options of each source of a mixture; nothing of another data module.

    Args:
        data: The options of the data module (`init_args`), of mappings or namespaces.
    """
    for name, source in dict(data.get("sources") or {}).items():
        module = source.get("data", source)
        yield name, module.get("init_args") or {}


def _is_ours(path: str) -> bool:
    """Whether a data module takes its rows from a source per split, and from nowhere else."""
    module, _, name = path.rpartition(".")
    hooks = ("val_dataloader", "test_dataloader", "predict_dataloader")
    found, base = getattr(importlib.import_module(module), name), datamodules.AlignmentDataModule
    return issubclass(found, base) and all(getattr(found, hook) is getattr(base, hook) for hook in hooks)
