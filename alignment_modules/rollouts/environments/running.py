"""Runs what tools and environments do: many episodes at once, each call with a time limit, none of them trusted."""

from __future__ import annotations

import inspect
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment_modules.rollouts.environments.async_loop import ANSWER_SECONDS, AsyncLoop
from alignment_modules.rollouts.environments.options import ToolOptions
from alignment_modules.rollouts.environments.parsing import Call
from alignment_modules.rollouts.environments.processes import START_SECONDS, Processes
from alignment_modules.rollouts.environments.quiet import quiet_output, quieten
from alignment_modules.rollouts.environments.results import Failure, Reason, Result, cut, error_text, late, text_of
from alignment_modules.rollouts.environments.schemas import ArgumentError, Tool


@dataclass(frozen=True)
class Job:
    """Something to call.

    Attributes:
        function: What is called; what an `async def` one promises is awaited.
        arguments: Its keywords.
        owner: The environment that it changes; None: it has no state.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    owner: Any = None


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        value: What it returned; None where it failed.
        error: What a policy or a warning is told; "" where it did not fail.
        reason: See `Result`.
    """

    value: Any = None
    error: str = ""
    reason: Reason = ""


@dataclass(frozen=True)
class Request:
    """A call of a policy, with the tools that it has.

    Attributes:
        call: What it wrote.
        tools: Those of its episode, by name.
    """

    call: Call
    tools: Mapping[str, Tool]


class Runner:
    """Runs jobs and calls of many episodes at once.

    Those of one episode run in order, each with the time limit of its own. A thread that is late is left to itself, and
    keeps no process from ending; while it lives, its environment answers no other call. Nothing that a tool does raises
    here, and nothing that it prints is seen.

    Args:
        options: Time limit, workers, lengths, and whether processes are used.
    """

    def __init__(self, options: ToolOptions | None = None) -> None:
        self.options = options or ToolOptions()
        self._processes = Processes(self.options)
        self._loop = AsyncLoop()
        self._late: list[tuple[Any, threading.Thread]] = []

    def run(self, episodes: Sequence[Sequence[Request]]) -> list[list[Result]]:
        """Answers the calls of a turn.

        Args:
            episodes: For each episode its calls, in order.

        Returns:
            As many results, in the same order.
        """
        prepared = [[self._prepare(request) for request in requests] for requests in episodes]
        jobs = [[one for one in row if isinstance(one, Job)] for row in prepared]
        outcomes = [iter(row) for row in self.outcomes(jobs)]
        return [
            [one if isinstance(one, Result) else _result(next(done)) for one in row]
            for row, done in zip(prepared, outcomes, strict=True)
        ]

    def outcomes(self, episodes: Sequence[Sequence[Job]]) -> list[list[Outcome]]:
        """Runs jobs, such as the `reset` or `get_reward` of environments.

        Args:
            episodes: For each episode its jobs, in order.

        Returns:
            As many outcomes, in the same order.
        """
        self._late = [(owner, thread) for owner, thread in self._late if thread.is_alive()]
        found: list[list[Outcome]] = [[] for _ in episodes]
        if not any(episodes):
            return found
        waiting = deque(row for row, jobs in enumerate(episodes) if jobs)
        running: dict[int, tuple[threading.Thread, float]] = {}
        done: queue.SimpleQueue[tuple[int, int, Outcome]] = queue.SimpleQueue()
        with quiet_output(self._anybody_late):
            while waiting or running:
                while waiting and len(running) < self.options.max_workers:
                    row = waiting.popleft()
                    running[row] = self._start(episodes[row][len(found[row])], row, len(found[row]), done)
                for row, outcome in self._finished(running, found, done, episodes):
                    found[row].append(outcome)
                    if len(found[row]) < len(episodes[row]):
                        waiting.append(row)
        return found

    def close(self) -> None:
        """Ends the processes of tools."""
        self._processes.close()

    def _anybody_late(self) -> bool:
        return any(thread.is_alive() for _, thread in self._late)

    def _finished(
        self,
        running: dict[int, tuple[threading.Thread, float]],
        found: list[list[Outcome]],
        done: queue.SimpleQueue[tuple[int, int, Outcome]],
        episodes: Sequence[Sequence[Job]],
    ) -> list[tuple[int, Outcome]]:
        """The next job that is done, or those that are late."""
        soonest = min(deadline for _, deadline in running.values())
        try:
            row, number, outcome = done.get(timeout=max(soonest - time.monotonic(), 0.0))
            if row not in running or number != len(found[row]):
                return []  # of a thread that was given up
            del running[row]
            return [(row, outcome)]
        except queue.Empty:
            overdue = [row for row, (_, deadline) in running.items() if deadline <= time.monotonic()]
        for row in overdue:
            self._late.append((episodes[row][len(found[row])].owner, running.pop(row)[0]))
        failure = late(self.options.time_limit)
        return [(row, Outcome(None, failure.text, failure.reason)) for row in overdue]

    def _start(
        self, job: Job, row: int, number: int, done: queue.SimpleQueue[tuple[int, int, Outcome]]
    ) -> tuple[threading.Thread, float]:
        def work() -> None:
            quieten()
            done.put((row, number, self._outcome(job)))

        thread = threading.Thread(target=work, name="tool", daemon=True)
        thread.start()
        return thread, time.monotonic() + self.options.time_limit + _grace(job.function)

    def _outcome(self, job: Job) -> Outcome:
        """Runs in a thread of its own; whatever happens becomes an outcome."""
        limit = self.options.max_characters
        if job.owner is not None and any(owner is job.owner and thread.is_alive() for owner, thread in self._late):
            return Outcome(None, "Error: the environment is still busy with an earlier call", "busy")
        try:
            value = self._loop.finished(job.function(**job.arguments), self.options.time_limit)
            return Outcome(value)
        except Failure as failure:
            return Outcome(None, failure.text, failure.reason)
        except BaseException as error:  # a tool may call exit, too
            return Outcome(None, error_text(error, limit), "raised")

    def _prepare(self, request: Request) -> Job | Result:
        call, limit = request.call, self.options.max_characters
        tool = request.tools.get(call.name)
        if tool is None:
            known = ", ".join(request.tools) or "none"
            return Result(
                cut(f"Error: there is no tool {call.name!r}; there are: {known}", limit), True, "unknown_tool"
            )
        try:
            arguments = tool.check(call.arguments, as_text=call.as_text)
        except ArgumentError as error:
            return Result(cut(f"Error: {error}", limit), True, "arguments")
        if not self.options.in_process and tool.path is not None:
            return Job(_InProcess(self._processes, tool.path), {"arguments": arguments})
        return Job(_AsText(tool.call, limit), {"arguments": arguments}, tool.owner)


@dataclass(frozen=True)
class _AsText:
    """A tool whose result becomes text within its time limit, as an object may take long to be written."""

    function: Callable[..., Any]
    limit: int

    def __call__(self, arguments: dict[str, Any]) -> Any:
        value = self.function(**arguments)
        if hasattr(value, "__await__"):
            return self._awaited(value)
        return text_of(value, self.limit)

    async def _awaited(self, value: Any) -> str:
        return text_of(await value, self.limit)


@dataclass(frozen=True)
class _InProcess:
    """A tool in a process of its own."""

    processes: Processes
    path: str

    def __call__(self, arguments: dict[str, Any]) -> Any:
        return self.processes.call(self.path, arguments)


def _grace(function: Callable[..., Any]) -> float:
    """Seconds more for those that keep the limit themselves: event loops and processes."""
    if isinstance(function, _InProcess):
        return START_SECONDS + 1.0
    inner = function.function if isinstance(function, _AsText) else function
    return 3 * ANSWER_SECONDS if inspect.iscoroutinefunction(inner) else 0.0


def _result(outcome: Outcome) -> Result:
    return Result(outcome.error or outcome.value or "", bool(outcome.reason), outcome.reason)
