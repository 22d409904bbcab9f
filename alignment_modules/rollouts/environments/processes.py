"""Tools in processes of their own: what hangs is ended, and what dies is a failed call."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignment_modules.rollouts.environments.options import ToolOptions
from alignment_modules.rollouts.environments.results import Failure, late

START_SECONDS = 60.0
"""How long a process may take to start and to import its tool."""


class Processes:
    """Fresh processes (nothing is forked), each for one function and one call at a time, kept for the next call.

    Args:
        options: The time limit of a call, and the length of what it returns.
    """

    def __init__(self, options: ToolOptions) -> None:
        self.options = options
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _end_all, self._idle)

    def call(self, path: str, arguments: dict[str, Any]) -> str:
        """Calls a function in a process.

        Args:
            path: Its import path.
            arguments: Its keywords; what JSON can hold.

        Returns:
            What it returned, as text.

        Raises:
            Failure: If it raised, was late, or its process died.
        """
        worker = self._take(path)
        try:
            answer = worker.ask(arguments, self.options.time_limit)
        except Failure:
            worker.end()
            raise
        with self._lock:
            self._idle.append(worker)
        if answer["failed"]:
            raise Failure(answer["text"], "raised")
        return answer["text"]

    def close(self) -> None:
        """Ends the processes that wait for a call."""
        with self._lock:
            _end_all(self._idle)

    def _take(self, path: str) -> _Worker:
        with self._lock:
            for worker in self._idle:
                if worker.path == path:
                    self._idle.remove(worker)
                    return worker
        return _Worker(path, self.options.max_characters)


class _Worker:
    """A process with a function."""

    def __init__(self, path: str, max_characters: int) -> None:
        self.path = path
        self.process = subprocess.Popen(  # noqa: S603 - this Python, and a file of this package
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C ends the run, which then ends its tools
        )
        start = {"sys_path": sys.path, "path": path, "max_characters": max_characters}
        try:
            answer = self.ask(start, START_SECONDS)
        except Failure:
            self.end()
            raise
        if answer["failed"]:
            self.end()
            raise Failure(answer["text"], "raised")

    def ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Sends a line and reads one.

        Raises:
            Failure: If there is no answer in time, or never will be.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("a process of a tool has no pipes")
        over = threading.Event()

        def give_up() -> None:
            over.set()
            self._kill()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
            line = stdout.readline()
        except OSError:  # the pipe is broken
            line = ""
        finally:
            timer.cancel()
        if over.is_set():
            raise late(seconds)
        if line.endswith("\n"):
            return json.loads(line)
        with suppress(subprocess.TimeoutExpired):  # one that closed its pipes and lives on is ended
            self.process.wait(1.0)
        self._kill()
        status = self.process.wait()
        raise Failure(f"Error: the process of the tool died (exit status {status})", "died")

    def end(self) -> None:
        """Ends the process and whatever it started."""
        self._kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _kill(self) -> None:
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(self.process.pid, signal.SIGKILL)
                else:  # Windows: what it started lives on
                    self.process.kill()


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()
