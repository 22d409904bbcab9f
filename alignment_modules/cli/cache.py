"""`align cache`: the tables on disk, how large they are and when they were last used; and their removal."""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from alignment_modules.cli.options import OptionParser
from datamodules.cache.listing import Listed, clear, listed
from datamodules.cache.options import cache_folder

_DAY = 24 * 3600


def cache_command(arguments: list[str]) -> int:
    """Runs `align cache`.

    Args:
        arguments: What follows `align cache`.

    Returns:
        0; 1 where something was to be removed that a process is making.

    Raises:
        ValueError: If the folder does not exist.
        CacheError: If it cannot be written.
    """
    given = _parser().parse_args(arguments)
    folder = cache_folder(given.folder)
    if given.folder and not folder.is_dir():
        raise ValueError(f"folder={given.folder!r}: there is no such folder")
    if given.clear is None:
        found = listed(folder)
        _show(found)
        print(f"{folder}: {_counted(found)}")
        return 0
    removed, left = clear(folder, given.clear * _DAY)
    print(f"{folder}: removed {_counted(removed)}, kept {_counted(listed(folder))}")
    for one in left:
        sys.stderr.write(f"align: error: {one.name} is being made by a process, so it was left\n")
    return int(bool(left))


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        "cache",
        "[--folder FOLDER] [--clear DAYS | --clear all]",
        "Show the tokenised tables that data modules keep on disk, or remove them. A run that has one open keeps it;\n"
        "what is removed is made again when it is next needed.",
        "align cache --clear 30",
    )
    parser.add_argument(
        "--folder", help="the folder (default: ALIGNMENT_MODULES_CACHE, else alignment_modules in the user's cache)"
    )
    parser.add_argument(
        "--clear", metavar="DAYS", type=_days, help="remove what was not used for so many days, or all of it"
    )
    return parser


def _days(text: str) -> float:
    try:
        days = 0.0 if text == "all" else float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of days of 0 or more, or all")
    return days


def _show(found: Iterable[Listed]) -> None:
    for one in found:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used))
        rows = "" if one.rows is None else f"{one.rows} rows"
        name = one.source if len(one.source) <= 60 else f"...{one.source[-57:]}"
        print(f"{_size(one.size):>9}  last used {day}  {one.kind:<18} {rows:>16}  {name or Path(one.name).name}")


def _counted(found: Iterable[Listed]) -> str:
    found = list(found)
    return f"{len(found)} {'entry' if len(found) == 1 else 'entries'}, {_size(sum(one.size for one in found))}"


def _size(count: int) -> str:
    number = float(count)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
