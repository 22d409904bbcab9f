"""Files of text lines and of comma-separated values; only the places of their rows are held in memory."""

from __future__ import annotations

import contextlib
import csv
import io
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.rows.identity import identity_of_file
from datamodules.rows.keeping import Keeper, KeepNothing, Lines

_LONGEST_FIELD = 2**31 - 1  # documents are longer than csv's default of 131,072 characters


def read_text(path: Path) -> str:
    """Content of a UTF-8 file, line ends as they are, without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1)
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {column})") from None


class _FileRows:
    """What both kinds of files share.

    Args:
        path: The file.
        keeper: Keeps the places of its rows, so that a later start need not read the file.

    Raises:
        ValueError: The file is no UTF-8 text; the message names the line.
    """

    kind = ""

    def __init__(self, path: Path, keeper: Keeper | None = None) -> None:
        self.path, self.name = path, str(path)
        self._identity = identity_of_file(path)
        self._places = (keeper or KeepNothing()).lines(path, self.kind, self._found)

    def _found(self) -> Lines:
        try:
            return self._find()
        except UnicodeDecodeError:
            read_text(self.path)  # says where
            raise

    def _find(self) -> Lines:
        raise NotImplementedError

    def _rows_of(self, file: Iterator[str]) -> Iterator[dict[str, Any]]:
        """The rows of text lines, of which the first begins a row."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._places.offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return next(self.between(index, index + 1))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.between(0, len(self))

    def between(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The rows from `start` up to, and without, `stop`."""
        if start >= stop:
            return
        with self.path.open("rb") as raw:
            raw.seek(int(self._places.offsets[start]))
            rows = self._rows_of(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
            for index in range(start, stop):
                if (row := next(rows, None)) is None:
                    raise ValueError(f"{self.where(index)}: the file was longer when it was opened")
                yield row

    def where(self, index: int) -> str:
        """Describe the place of row `index`."""
        return f"row {index} of {self.name}"

    def identity(self) -> Any:
        """The file's path, size and time of the last change."""
        return self._identity

    @contextlib.contextmanager
    def _lines(self) -> Iterator[_Counted]:
        with self.path.open("rb") as raw:
            marked = raw.read(3) == b"\xef\xbb\xbf"
            raw.seek(3 if marked else 0)
            yield _Counted(io.TextIOWrapper(raw, encoding="utf-8", newline=""), 3 if marked else 0)


class _Counted:
    """Lines of a file, with the bytes that were read so far."""

    def __init__(self, file: Iterator[str], start: int) -> None:
        self.file, self.offset, self.number = file, start, 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        line = next(self.file)
        self.offset += len(line) if line.isascii() else len(line.encode())
        self.number += 1
        return line


class TextRows(_FileRows):
    """Lines of a text file as the column `text`; blank ones are skipped."""

    kind = "text"

    def _find(self) -> Lines:
        offsets, numbers, before = array("q"), array("q"), 0
        with self._lines() as lines:
            before = lines.offset
            for line in lines:
                if line.strip():
                    offsets.append(before)
                    numbers.append(lines.number)
                before = lines.offset
        return Lines.of(offsets, numbers)

    def _rows_of(self, file: Iterator[str]) -> Iterator[dict[str, Any]]:
        return ({"text": line.rstrip("\r\n")} for line in file if line.strip())


class CsvRows(_FileRows):
    """A file of comma-separated values with a header.

    Every value stays a string: "007" and "1.0" must not turn into numbers that a verifier then compares.

    Args:
        path: The file.
        keeper: Keeps the places of its rows, so that a later start need not read the file.
        delimiter: What stands between values.

    Raises:
        ValueError: A row is not valid, or has not as many fields as the header; the message starts with `path:line`.
    """

    def __init__(self, path: Path, keeper: Keeper | None = None, delimiter: str = ",") -> None:
        self.delimiter, self.kind = delimiter, f"values between {delimiter!r}"
        with path.open("rb") as raw:
            try:
                self.header = self._head(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), path)
            except UnicodeDecodeError:
                read_text(path)
                raise
        super().__init__(path, keeper)

    def _head(self, file: Iterator[str], path: Path) -> list[str]:
        with _errors_of(reader := self._reader(file), path):
            header = next(reader, None) or []
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise ValueError(f"{path}:{reader.line_num}: the header names {repeated} more than once: {header}")
        return header

    def _reader(self, file: Iterator[str]) -> Any:
        csv.field_size_limit(max(_LONGEST_FIELD, csv.field_size_limit()))
        return csv.reader(file, delimiter=self.delimiter, strict=True)

    def _find(self) -> Lines:
        offsets, numbers = array("q"), array("q")
        with self._lines() as lines, _errors_of(reader := self._reader(lines), self.path):
            next(reader, None)
            before, line = lines.offset, lines.number + 1
            for fields in reader:
                if fields and len(fields) != len(self.header):
                    raise ValueError(
                        f"{self.path}:{reader.line_num}: {len(fields)} fields, the header has {len(self.header)}: "
                        f"{self.header}"
                    )
                if fields:
                    offsets.append(before)
                    numbers.append(line)
                before, line = lines.offset, lines.number + 1
        return Lines.of(offsets, numbers)

    def _rows_of(self, file: Iterator[str]) -> Iterator[dict[str, Any]]:
        return (dict(zip(self.header, fields, strict=True)) for fields in self._reader(file) if fields)


@contextlib.contextmanager
def _errors_of(reader: Any, path: Path) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None
