"""What a data module keeps on disk: places of rows in files, copies of files, and tables."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from datamodules.cache.arrays import write_array
from datamodules.cache.building import Building, open_pieces
from datamodules.cache.forms import UnknownForm, collate_of, put_together
from datamodules.cache.keys import lines_key, table_key
from datamodules.cache.options import CacheOptions
from datamodules.cache.store import Damaged, Entry, Store, digest_of
from datamodules.lengths import HowLong
from datamodules.reading import Batches, SplitReader
from datamodules.rows.identity import identity_of_file
from datamodules.rows.keeping import Lines

logger = logging.getLogger(__name__)


class Kept:
    """Keeps what takes long to make of at least `least_rows` rows.

    Args:
        options: Where, and how it is made.
    """

    def __init__(self, options: CacheOptions) -> None:
        self.options, self.store = options, Store(options.path)

    def lines(self, path: Path, kind: str, find: Callable[[], Lines]) -> Lines:
        """The places of a file's rows, found at the first start (a `Keeper`)."""
        identity = identity_of_file(path)
        digest = digest_of(lines_key(identity, kind))
        entry, found = self._find(digest), None
        if entry is None:
            found = find()
            if len(found.offsets) < self.options.least_rows:
                return found
            if identity_of_file(path) != identity:
                raise ValueError(f"{path} was changed while it was being read; start again")
            places = found

            def write(folder: Path) -> dict[str, Any]:
                for name, array in (("offsets", places.offsets), ("lines", places.lines)):
                    write_array(folder / f"{name}.npy", [array], array.dtype, len(array))
                return {}

            about = {"kind": "lines", "source": str(path), "rows": len(found.offsets)}
            entry = self.store.obtain(digest, about, write)
        return Lines(entry.array("offsets"), entry.array("lines"))

    def copy(self, path: Path, kind: str, rows: int, write: Callable[[Path], None]) -> Path | None:
        """A file's copy in another form, written when it is first asked for (a `Keeper`)."""
        if rows < self.options.least_rows:
            return None

        def make(folder: Path) -> dict[str, Any]:
            write(folder / kind)
            return {}

        about = {"kind": f"copy ({kind})", "source": str(path), "rows": rows}
        digest = digest_of(lines_key(identity_of_file(path), kind))
        return self.store.obtain(digest, about, make).folder / kind

    def table(self, data: Any, reader: SplitReader, prompts: bool) -> Batches | None:
        """A split's table, made at the first start and mapped at each.

        Args:
            data: The data module.
            reader: The split; gets the report.
            prompts: Whether its prompts alone count.

        Returns:
            The table and what makes its batches; None where it is to be made in memory.

        Raises:
            ValueError: A row cannot be used, or none is left.
            CacheError: The folder cannot be written.
        """
        if len(reader.rows) < self.options.least_rows:
            return None
        key = table_key(data, reader, prompts)
        if key is None:
            logger.info("%s is tokenised in memory: what it is made of cannot be compared later", reader.split)
            return None
        build = SplitReader.prompt_table if prompts else data.build
        building = Building(reader, build, self.options.processes, self.store.explained)
        about = {"kind": f"table ({reader.split})", "source": reader.rows.name, "rows": len(reader.rows)}
        digest = digest_of(key)
        try:
            entry = self._find(digest) or self.store.obtain(digest, about, building.make)
        except UnknownForm as found:
            logger.info("%s is tokenised in memory: %s is no table of this library", reader.split, found)
            self.store.remove(f"unfinished-{digest}")
            return None
        return _opened(entry, reader)

    def _find(self, digest: str) -> Entry | None:
        try:
            return self.store.find(digest)
        except Damaged:  # making it again says so
            return None


def _opened(entry: Entry, reader: SplitReader) -> Batches:
    """Maps a table, and says of it what was said when it was made."""
    facts = entry.facts
    reader.report.clear()
    reader.report.update(facts["report"])
    reader.how_long = HowLong(*facts["how_long"])
    for name, level, text in facts["messages"]:
        _say(name, level, text)
    return put_together(open_pieces(facts, entry.array), reader.rows), collate_of(facts["collate"])


@rank_zero_only
def _say(name: str, level: int, text: str) -> None:
    logging.getLogger(name).log(level, text)
