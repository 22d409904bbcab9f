"""What a chat shows: plain lines in a pipe; colours, wrapped words and columns on a terminal."""

import contextlib
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

PROMPT = "> "


class Shown(Protocol):
    """An answer that is being shown."""

    def __call__(self, piece: str) -> None:
        """Shows more of its text."""

    def block(self, title: str, text: str, *, failed: bool = False) -> None:
        """Shows, on lines of their own, what is no text of it, such as the result of a tool."""


class Screen:
    """The user's side of a chat, on the process's standard streams."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, markup=False, emoji=False)
        self.asks = sys.stdin.isatty()
        if self.asks:
            with contextlib.suppress(ImportError):  # Windows has an editing of its own
                import readline  # noqa: F401  gives `input` its line editing and history

    def read(self) -> str | None:
        """The next line of the user; None at the end of the input."""
        if self.asks:
            try:
                return input(PROMPT)
            except EOFError:
                print()
                return None
        line = sys.stdin.readline()
        if not line:
            return None
        line = line.rstrip("\r\n")
        self.console.print(f"{PROMPT}{printable(line)}", soft_wrap=True)  # a pipe shows no typing
        return line

    def note(self, text: str) -> None:
        """Shows a remark."""
        self.console.print(printable(text), style="dim")

    def error(self, text: str) -> None:
        """Shows what could not be done."""
        self.console.print(printable(text), style="red")

    @contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[Callable[[int], AbstractContextManager[Shown]]]:
        """Shows answers as they are written, one after the other; on a terminal two are side by side.

        Args:
            names: Whose they are; one alone is not named.

        Yields:
            What begins the answer with a number, and gives what shows its pieces.
        """
        if len(names) > 1 and self.console.is_terminal:
            with Live(console=self.console, auto_refresh=False) as live:
                columns = _Columns(live, names)
                yield columns.begin
        else:
            yield lambda number: self._one(names[number] if len(names) > 1 else "")

    @contextmanager
    def _one(self, name: str) -> Iterator[Shown]:
        if name:
            self.console.print(f"{printable(name)}:", style="bold cyan", soft_wrap=True)
        writer = _Writer(self.console)
        try:
            yield writer
        finally:
            self.console.file.write("\n")
            self.console.file.flush()


class _Columns:
    """Answers side by side, drawn again for each piece."""

    def __init__(self, live: Live, names: Sequence[str]) -> None:
        self.live, self.names, self.texts = live, names, ["" for _ in names]

    @contextmanager
    def begin(self, number: int) -> Iterator[Shown]:
        self.draw()
        yield _Column(self, number)

    def draw(self) -> None:
        table = Table(*map(printable, self.names), expand=True, header_style="bold cyan")
        for column in table.columns:
            column.ratio = 1
        table.add_row(*map(Text, self.texts))
        self.live.update(table, refresh=True)


class _Column:
    """One of the answers side by side."""

    def __init__(self, columns: _Columns, number: int) -> None:
        self.columns, self.number = columns, number

    def __call__(self, piece: str) -> None:
        self.columns.texts[self.number] += printable(piece)
        self.columns.draw()

    def block(self, title: str, text: str, *, failed: bool = False) -> None:
        fresh = self.columns.texts[self.number][-1:] in ("", "\n")
        self(f"{'' if fresh else chr(10)}[{title}] {text}\n")


class _Writer:
    """Writes one answer in pieces; on a terminal no word is broken at the edge."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = console.width if console.is_terminal else 0
        self._column, self._word = 0, ""
        self._fresh = True

    def __call__(self, piece: str) -> None:
        text = printable(piece)
        self._fresh = text.endswith("\n") if text else self._fresh
        self.console.file.write("".join(map(self._wrapped, text)) if self.width else text)
        self.console.file.flush()

    def block(self, title: str, text: str, *, failed: bool = False) -> None:
        if not self._fresh:
            self("\n")
        told = Text(f"[{printable(title)}] ", "bold red" if failed else "bold cyan") + Text(printable(text))
        self.console.print(told, soft_wrap=True)
        self._fresh = True

    def _wrapped(self, character: str) -> str:
        """A character; where it lies beyond the edge, its word is taken back and put on the next line."""
        if character == "\n":
            self._column, self._word = 0, ""
            return character
        before, self._word = self._word, "" if character.isspace() else self._word + character
        self._column += cell_len(character)
        if self._column < self.width:
            return character
        if character.isspace():
            self._column = 0
            return "\n"
        if not before or cell_len(before) >= self.width // 2:  # nothing to take back, or no word of a language
            self._column, self._word = cell_len(character), character
            return f"\n{character}"
        self._column = cell_len(self._word)
        return f"\x1b[{cell_len(before)}D\x1b[K\n{self._word}"


def printable(text: str) -> str:
    """Text without control characters, by which a policy could steer the terminal; tabs become spaces."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if c != "\n" and unicodedata.category(c) in ("Cc", "Cs") else c
        for c in text.replace("\t", "    ")
    )
