"""A JSONL file that is written batch by batch, and that a run which was killed goes on with."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from alignment_modules.callbacks.jsonl import naming, to_json_line


class RowFile:
    """Appends rows, each with its `index`; as a context it is open.

    Beside the file, `.NAME.options` keeps what the rows are made with, so that nothing else is ever appended.

    Args:
        path: The JSONL file.
        options: What decides the rows, as plain values.

    Attributes:
        count: Rows that are in the file.
        last: The `index` of the last of them; None: there is none.

    Raises:
        ValueError: If the file holds rows that were made with other options, or by something else.
        OSError: If it cannot be read or written.
    """

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        self.path, self.options = path, dict(options)
        self.count = 0
        self.last: int | None = None
        self._file: BinaryIO | None = None
        beside = path.with_name(f".{path.name}.options")
        with naming(path):
            if path.exists() and path.stat().st_size:
                self._check_options(beside)
                self._take_up()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                beside.write_text(json.dumps(self.options, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def _check_options(self, beside: Path) -> None:
        try:
            former = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            former = None
        if not isinstance(former, dict):
            raise ValueError(f"write={str(self.path)!r} holds something else; give another file, or remove it")
        for name in sorted({**former, **self.options}):
            if former.get(name) != self.options.get(name):
                raise ValueError(
                    f"write={str(self.path)!r} was begun with {name}={former.get(name)!r}, now it is "
                    f"{self.options.get(name)!r}; go on with the same, give another file, or remove it"
                )

    def _take_up(self) -> None:
        """Counts the whole rows, and cuts off what was written of the next."""
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    self.last = int(json.loads(line)["index"])
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{self.path}:{self.count + 1}: is no row of this file: {error}") from error
                self.count, end = self.count + 1, end + len(line)
        os.truncate(self.path, end)

    def __enter__(self) -> "RowFile":
        with naming(self.path):
            self._file = self.path.open("ab")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the rows that come after the last, and flushes them.

        Args:
            rows: With ascending `index`.

        Raises:
            OSError: If they cannot be written.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: is not open")
        new = [dict(row) for row in rows if self.last is None or row["index"] > self.last]
        with naming(self.path):
            self._file.write("".join(map(to_json_line, new)).encode())
            self._file.flush()
        if new:
            self.count, self.last = self.count + len(new), int(new[-1]["index"])
