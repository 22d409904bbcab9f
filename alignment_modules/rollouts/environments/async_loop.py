"""One event loop in a thread of its own, for what `async def` tools promise."""

import asyncio
import inspect
import os
import threading
from typing import Any

from alignment_modules.rollouts.environments.results import late

ANSWER_SECONDS = 1.0
"""How long a loop may take to say that it is alive, and a promise to end once it is cancelled."""


class AsyncLoop:
    """Awaits promises in one loop, so that a client made in one call serves the next.

    A promise that is late is cancelled. One that blocks the loop instead of awaiting takes it down: the next promise
    gets another loop.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = -1
        self._lock = threading.Lock()

    def finished(self, value: Any, timeout: float) -> Any:
        """A value, or what it promises if it is an awaitable.

        Args:
            value: What a function returned.
            timeout: Seconds.

        Raises:
            Failure: If the time is over.
        """
        if not inspect.isawaitable(value):
            return value
        loop = self._running()
        ended = threading.Event()
        future = asyncio.run_coroutine_threadsafe(_awaited(value, ended), loop)
        try:
            return future.result(timeout)
        except TimeoutError:
            if future.done():  # the tool's own
                raise
            future.cancel()
            if not ended.wait(ANSWER_SECONDS):  # its `finally` may still change the environment
                self._replace_if_blocked(loop)
            raise late(timeout) from None

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._process != os.getpid():  # a fork has none of its parent's threads
                self._loop, self._process = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=self._loop.run_forever, name="async tools", daemon=True).start()
            return self._loop

    def _replace_if_blocked(self, loop: asyncio.AbstractEventLoop) -> None:
        alive = threading.Event()
        loop.call_soon_threadsafe(alive.set)
        if not alive.wait(ANSWER_SECONDS):
            with self._lock:
                if self._loop is loop:
                    self._loop = None


async def _awaited(value: Any, ended: threading.Event) -> Any:
    try:
        return await value
    finally:
        ended.set()
