"""One call of one reward: plain or asynchronous functions, with or without a time limit, and checks of the result."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import os
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from numbers import Real
from typing import Any, NoReturn

import numpy as np
import torch

from alignment_modules.functional.http import short
from alignment_modules.rewards.protocol import RewardError

SEARCH_SECONDS = 1.0
"""How long a reward that raised on a batch is called again, row by row, to find the row to blame."""


def compute(function: Callable[..., Any], name: str, arguments: dict[str, list[Any]], count: int) -> list[float]:
    """Calls a reward and checks what it returns.

    Args:
        function: The reward.
        name: Its name, for messages.
        arguments: What it asked for, each a list of `count` entries.
        count: Number of completions.

    Returns:
        One number per completion; NaN: the reward does not apply.

    Raises:
        RewardError: If it raises, or returns something else than `count` finite numbers, None or NaN.
    """
    if not count:
        return []
    started = time.monotonic()
    try:
        # a copy of each list, so that a reward that edits its arguments cannot change another's
        result = call(function, {key: list(value) for key, value in arguments.items()})
    except RewardError as error:
        raise RewardError(f"reward {name!r}: {error}") from error
    except Exception as error:
        _blame_row(function, name, arguments, count, error, started)
    return numbers(result, name, count)


def call(function: Callable[..., Any], arguments: dict[str, Any], timeout: float | None = None) -> Any:
    """Calls a function; what an `async def` one promises is awaited, whether or not an event loop is running.

    All awaitables run in one loop in a thread of its own, so that a client made in one call serves the next.

    Args:
        function: The function.
        arguments: Its keywords.
        timeout: Seconds after which to give up; None: never. A plain function cannot be stopped: it is left to itself.

    Returns:
        What the function returns.

    Raises:
        TimeoutError: If the time is over.
    """
    result = function(**arguments) if timeout is None else _in_thread(function, arguments, timeout)
    if not inspect.isawaitable(result):
        return result
    future = asyncio.run_coroutine_threadsafe(_awaited(result), _event_loop(os.getpid()))
    try:
        return future.result(timeout)
    except TimeoutError as error:
        if future.done():  # the function's own
            raise
        raise TimeoutError(f"no answer within timeout={timeout} seconds") from error
    finally:
        future.cancel()


def numbers(result: Any, name: str, count: int) -> list[float]:
    """What a reward returned, as plain numbers; NaN where it does not apply.

    Args:
        result: A sequence, tensor or array of numbers and None.
        name: The reward's name, for messages.
        count: Number of completions.

    Returns:
        `count` numbers.

    Raises:
        RewardError: If it is something else, of another length, or infinite.
    """
    if isinstance(result, torch.Tensor):
        result = result.detach().cpu().tolist()
    elif hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, Sequence) or isinstance(result, str | bytes):
        raise RewardError(
            f"reward {name!r} returned {type(result).__name__} {short(result)}; "
            f"it must return a list of {count} numbers"
        )
    if len(result) != count:
        raise RewardError(f"reward {name!r} returned {len(result)} values for {count} completions")
    return [_number(value, name, row) for row, value in enumerate(result)]


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The loop of this process; a fork has none of its parent's threads and starts its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _in_thread(function: Callable[..., Any], arguments: dict[str, Any], timeout: float) -> Any:
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put((True, function(**arguments)))
        except BaseException as error:
            answers.put((False, error))

    threading.Thread(target=answer, daemon=True).start()  # one that hangs must not keep the process alive
    try:
        good, result = answers.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f"no answer within timeout={timeout} seconds") from None
    if not good:
        raise result
    return result


def _number(value: Any, name: str, row: int) -> float:
    if value is None:
        return math.nan
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    if not isinstance(value, Real):
        raise RewardError(
            f"reward {name!r} returned {type(value).__name__} {short(value)} in row {row}; "
            "it must be a number, or None where the reward does not apply"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isnan(number) and not abs(number) <= torch.finfo(torch.float32).max:
        raise RewardError(f"reward {name!r} returned {short(value)} in row {row}; it must be finite (float32)")
    return number


def _blame_row(
    function: Callable[..., Any],
    name: str,
    arguments: dict[str, list[Any]],
    count: int,
    error: Exception,
    started: float,
) -> NoReturn:
    """Finds the row by judging each alone, as far as `SEARCH_SECONDS` from the start of the failing call allow."""
    what = f"{type(error).__name__}: {error}"
    took = time.monotonic() - started
    for row in range(count):
        if time.monotonic() - started + took > SEARCH_SECONDS:
            raise RewardError(
                f"reward {name!r} raised on {count} rows after {took:.1f} s: {what}. It is too slow to be asked row by "
                "row; alignment_modules.rewards.PatientReward around it offers retries, a timeout and threads"
            ) from error
        try:
            call(function, {key: value[row : row + 1] for key, value in arguments.items()})
        except Exception:
            shown = f" (completion {short(arguments['completions'][row])})" if "completions" in arguments else ""
            raise RewardError(f"reward {name!r} raised in row {row}{shown}: {what}") from error
    raise RewardError(f"reward {name!r} raised on {count} rows, though on none of them alone: {what}") from error
