"""One line that is drawn again and again: in a terminal, in a notebook, or seldom in a file."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from typing import Any, TextIO

_ERASE = "\r\x1b[K"
_WIDEST = 100
_LOGGERS = ("", "lightning", "lightning.pytorch", "lightning.fabric", "alignment_modules", "datamodules")


class Line:
    """A line of text that changes; `draw` may be called as often as one likes.

    Args:
        file_seconds: Where the output is neither a terminal nor a notebook, so much time lies between two lines of it.
    """

    def __init__(self, file_seconds: float) -> None:
        self.file_seconds = file_seconds
        self._notebook = _notebook_display()
        self._drawn_at = time.monotonic() if self.kind == "file" else -1e9
        self._on_screen = False
        self._handle: Any = None
        self._handlers: list[logging.Handler] = []
        self._show_warning: Any = None

    @property
    def stream(self) -> TextIO:
        """Where it is written."""
        return sys.stderr

    @property
    def kind(self) -> str:
        """What shows the line: "notebook", "terminal" or "file"."""
        if self._notebook is not None:
            return "notebook"
        return "terminal" if self.stream.isatty() and os.environ.get("TERM") != "dumb" else "file"

    @property
    def width(self) -> int:
        """Columns of a line."""
        if self.kind != "terminal":
            return 80
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return min(columns or 80, _WIDEST) - 1  # a full line would wrap

    def due(self) -> bool:
        """Whether enough time has passed to draw again."""
        wait = {"terminal": 0.1, "notebook": 0.5, "file": self.file_seconds}[self.kind]
        return time.monotonic() - self._drawn_at >= wait

    def draw(self, text: str, *, last: bool = False) -> None:
        """Shows a text of at most `width` columns.

        Args:
            text: The line.
            last: Whether it stays.
        """
        self._drawn_at = time.monotonic()
        if self.kind == "notebook":
            self._display(text)
        elif self.kind == "terminal":
            self._keep_whole()
            self.stream.write(f"{_ERASE}{text}" + ("\n" if last else ""))
            self.stream.flush()
            self._on_screen = not last
        else:
            print(text, file=self.stream, flush=True)
        if last:
            self._handle = None

    def clear(self) -> None:
        """Makes room for other output."""
        if self._on_screen:
            self.stream.write(_ERASE)
            self.stream.flush()
            self._on_screen = False

    def end(self) -> None:
        """Leaves the screen to others."""
        self.clear()
        self._handle = None
        for handler in self._handlers:
            handler.removeFilter(self._make_room)
        self._handlers = []
        if self._show_warning is not None and warnings.showwarning == self._warn:
            warnings.showwarning = self._show_warning
        self._show_warning = None

    def _keep_whole(self) -> None:
        """Has messages and warnings of this process begin on a line of their own."""
        if self._show_warning is None:
            self._show_warning = warnings.showwarning
            warnings.showwarning = self._warn
        for name in _LOGGERS:
            for handler in logging.getLogger(name).handlers:
                if handler not in self._handlers:
                    handler.addFilter(self._make_room)
                    self._handlers.append(handler)

    def _make_room(self, record: logging.LogRecord) -> bool:
        self.clear()
        return True

    def _warn(self, *arguments: Any, **options: Any) -> None:
        self.clear()
        self._show_warning(*arguments, **options)

    def _display(self, text: str) -> None:
        content = {"text/plain": text}
        if self._handle is None:
            self._handle = self._notebook(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def _notebook_display() -> Any:
    """IPython's `display` in a notebook; None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import display

    return display
