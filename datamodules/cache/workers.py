"""Processes that do numbered pieces of one task."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast


def in_processes(task: Callable[[Any], Any], pieces: Sequence[Any], processes: int) -> Iterator[tuple[int, Any]]:
    """Does a task for each piece, in processes that are forked off; what they hold in memory goes with them.

    A process that ends by itself, and one whose parent is gone, leaves nothing behind. Where processes cannot be forked
    safely (on other systems than Linux) this one does it all.

    Args:
        task: Gets a piece; its result can be pickled.
        pieces: The pieces.
        processes: How many processes work at the same time.

    Yields:
        Number and result of each piece, as they come.

    Raises:
        Exception: That of the first piece, in their order, for which the task raised one; those before are done.
        RuntimeError: A process was killed.
    """
    if sys.platform != "linux":
        yield from ((number, task(piece)) for number, piece in enumerate(pieces))
        return
    workers: dict[Connection, Any] = {}
    busy: dict[Connection, int] = {}
    failed: dict[int, Exception] = {}
    waiting = list(range(len(pieces)))[::-1]
    try:
        with _one_thread_each():
            for _ in range(min(processes, len(pieces))):
                process, connection = _start(task)
                workers[connection] = process
        while True:
            for connection in workers:
                if connection not in busy and waiting and not failed:
                    busy[connection] = waiting.pop()
                    connection.send(pieces[busy[connection]])
            if not busy:
                break
            for ready in wait(list(busy)):
                number = busy.pop(connection := cast(Connection, ready))
                good, result = _answer(connection, workers[connection])
                if good:
                    yield number, result
                else:
                    failed[number] = result
        if failed:
            raise failed[min(failed)]
    finally:
        for connection, process in workers.items():
            connection.close()
            process.terminate()
        for process in workers.values():
            process.join()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Tells tokenizers, which warn of a fork else, that each process is to use one thread."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _start(task: Callable[[Any], Any]) -> tuple[Any, Connection]:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_work, args=(task, theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _work(task: Callable[[Any], Any], connection: Connection, parent: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in (signal.SIGINT, signal.SIGHUP):  # of a terminal; the parent ends this process then
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    while True:
        try:
            piece = connection.recv()
        except EOFError:
            return
        try:
            answer = True, task(piece)
        except Exception as error:
            answer = False, _sendable(error)
        connection.send(answer)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _sendable(error: Exception) -> Exception:
    """The error, or one of the same text where it could not be made again from its arguments."""
    try:
        pickle.dumps(type(error)(*error.args))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _answer(connection: Connection, process: Any) -> tuple[bool, Any]:
    try:
        answer: tuple[bool, Any] = connection.recv()
        return answer
    except (EOFError, ConnectionResetError):
        process.join()
        ended = f"was killed by signal {-process.exitcode}" if process.exitcode < 0 else f"ended ({process.exitcode})"
        raise RuntimeError(
            f"a process that tokenises {ended}; where memory ran out, let fewer of them work (cache.num_proc)"
        ) from None
