"""What tools print is not seen: it would run into the progress bar."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_lock = threading.Lock()
_users = 0


def quieten() -> None:
    """Drops what this thread, and what it has awaited, writes to `sys.stdout` and `sys.stderr`."""
    _quiet.set(True)


@contextmanager
def quiet_output(keep: Callable[[], bool]) -> Iterator[None]:
    """Lets `quieten` work within; all other threads write as ever.

    Args:
        keep: Whether threads are left that may still write: then the streams stay as they are at the end, until the
            next time.
    """
    global _users
    with _lock:
        _users += 1
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and not isinstance(stream, _Muted):
                setattr(sys, name, _Muted(stream))
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users and not keep():
                for name in ("stdout", "stderr"):
                    if isinstance(stream := getattr(sys, name), _Muted):
                        setattr(sys, name, stream.stream)


class _Muted:
    """A stream that drops what quiet threads write and is the stream itself to all others."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return len(text) if _quiet.get() else self.stream.write(text)

    def writelines(self, lines: Any) -> None:
        if not _quiet.get():
            self.stream.writelines(lines)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
