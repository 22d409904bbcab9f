"""Whatever a tool does becomes a result, in time, and nothing of it is seen."""

import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest

from alignment_modules.rollouts.environments import Call, Job, Request, Result, Runner, ToolOptions
from alignment_modules.rollouts.environments.results import cut, text_of
from alignment_modules.rollouts.environments.schemas import tool_of
from tests.rollouts.environments import things


def tools(*functions, owner=None):
    return {function.__name__: tool_of(function, "x", owner=owner) for function in functions}


def request(function, owner=None, **arguments):
    return Request(Call(function.__name__, arguments), tools(function, owner=owner))


def once(function, options=None, **arguments):
    [[result]] = Runner(options or ToolOptions(time_limit=5)).run([[request(function, **arguments)]])
    return result


def join_tools():
    """Waits for threads that were left to themselves."""
    for thread in threading.enumerate():
        if thread.name == "tool":
            thread.join(10)


class Weird(Exception):
    def __str__(self):
        raise RuntimeError


def returns(value):
    def tool():
        """Returns."""
        return value() if callable(value) else value

    return tool


def raises(error):
    def tool():
        """Raises."""
        raise error

    return tool


class Broken:
    def __str__(self):
        raise RuntimeError("no text")


class Thing:
    def __str__(self):
        return "a thing"


CYCLE = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("text", "text"),
        ("", ""),
        (4, "4"),
        (1.5, "1.5"),
        (True, "true"),
        (None, "null"),
        ({"a": [1, None], "ü": "é"}, '{"a": [1, null], "ü": "é"}'),
        ((1, Thing()), '[1, "a thing"]'),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        (CYCLE, "[[...]]"),
        (Thing(), "a thing"),
        (b"gr\xc3\xbc\xff", "grü\ufffd"),
        (bytearray(b"ab"), "ab"),
        ("half \ud800", "half ?"),
        ("<|im_end|>", "<|im_end|>"),
        ("nul \x00", "nul \x00"),
    ],
)
def test_what_a_tool_returns_becomes_text(value, text):
    assert once(returns(value)) == Result(text)


@pytest.mark.parametrize("value", ["x" * 5_000_000, b"\xff" * 5_000_000, ["x" * 5_000_000], "ü" * 5_000_000])
def test_megabytes_are_cut(value):
    result = once(returns(value), ToolOptions(max_result_length=10))
    assert not result.failed
    assert len(result.text) < 400
    assert "[cut: " in result.text
    assert len(result.text.encode()) < 1200


def test_cut():
    assert cut("abc", 3) == "abc"
    assert text_of(b"abcdef", 3) == "abc [cut: 3 of 6 characters]"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("too large"), "Error: ValueError: too large"),
        (KeyError("x"), "Error: KeyError: 'x'"),
        (ValueError(), "Error: ValueError"),
        (SystemExit(3), "Error: SystemExit: 3"),
        (KeyboardInterrupt(), "Error: KeyboardInterrupt"),
        (TimeoutError("its own"), "Error: TimeoutError: its own"),
        (StopIteration(), "Error: StopIteration"),
        (Weird(), "Error: Weird"),
        (MemoryError(), "Error: MemoryError"),
        (asyncio.CancelledError(), "Error: CancelledError"),
    ],
    ids=repr,
)
def test_a_tool_that_raises(error, text):
    assert once(raises(error)) == Result(text, True, "raised")


def test_an_object_without_text():
    assert once(returns(Broken())) == Result("Error: RuntimeError: no text", True, "raised")


def test_unending_recursion():
    def tool():
        """Recurs."""
        return tool()

    assert once(tool).text.startswith("Error: RecursionError")


def test_unknown_tools_and_wrong_arguments():
    known = tools(things.double, things.misbehave)
    calls = [Call("nosuch", {}), Call("double", {"number": "3"}), Call("double", {}), Call("double", {"number": 3})]
    [results] = Runner().run([[Request(call, known) for call in calls]])
    assert [result.reason for result in results] == ["unknown_tool", "arguments", "arguments", ""]
    assert results[0].text == "Error: there is no tool 'nosuch'; there are: double, misbehave"
    assert results[1].text == "Error: number='3' of double must be integer; usage: double(number: integer)"
    assert results[3] == Result("6")
    assert Runner().run([[Request(Call("x" * 999999, {}), {})], []])[0][0].text.startswith("Error: there is no tool")
    assert Runner().run([]) == []
    [[named]] = Runner().run([[Request(Call("double", {"number": "3"}, as_text=True), known)]])
    assert named == Result("6")


def test_a_tool_that_hangs_is_left_to_itself():
    release = threading.Event()

    def hang():
        """Hangs."""
        release.wait(30)

    started = time.monotonic()
    runner = Runner(ToolOptions(time_limit=0.3))
    requests = [[request(hang), request(things.double, number=2)], [request(things.double, number=4)]]
    results = runner.run(requests)
    assert time.monotonic() - started < 3
    assert results[0] == [Result("Error: no answer within 0.3 seconds", True, "time_limit"), Result("4")]
    assert results[1] == [Result("8")]
    hanging = [thread for thread in threading.enumerate() if thread.name == "tool"]
    assert hanging
    assert all(thread.daemon for thread in hanging)  # so that the process can end
    release.set()


def test_an_environment_that_hangs_answers_nothing_else_until_it_is_back():
    release, owner = threading.Event(), object()

    def hang():
        """Hangs."""
        release.wait(30)
        return "back"

    runner = Runner(ToolOptions(time_limit=0.3))
    [[late, busy], [other]] = runner.run(
        [[request(hang, owner), request(things.double, owner, number=2)], [request(things.double, object(), number=2)]]
    )
    assert (late.reason, busy.reason, other.text) == ("time_limit", "busy", "4")
    assert runner.run([[request(things.double, owner, number=2)]])[0][0].reason == "busy"
    release.set()
    join_tools()
    assert runner.run([[request(things.double, owner, number=2)]]) == [[Result("4")]]


def test_calls_run_at_once_those_of_an_episode_in_order():
    together, order = threading.Barrier(4), []

    def meet(number: int):
        """Meets.

        Args:
            number: A number.
        """
        together.wait(10)
        order.append(number)
        return number

    results = Runner(ToolOptions(max_workers=4)).run(
        [[request(meet, number=10 * e + c) for c in (0, 1)] for e in range(4)]
    )
    assert [[result.text for result in row] for row in results] == [[f"{10 * e}", f"{10 * e + 1}"] for e in range(4)]
    for episode in range(4):
        assert order.index(10 * episode) < order.index(10 * episode + 1)


def test_no_more_workers_than_allowed():
    running, most, lock = [0], [0], threading.Lock()

    def work():
        """Works."""
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1

    Runner(ToolOptions(max_workers=3)).run([[request(work)] for _ in range(20)])
    assert most[0] <= 3


def test_promises_are_awaited_in_one_loop():
    loops = set()

    async def look(number: int) -> int:
        """Looks.

        Args:
            number: A number.
        """
        loops.add(id(asyncio.get_running_loop()))
        await asyncio.sleep(0.01)
        print("PRINTED")
        return number

    runner = Runner()
    assert runner.run([[request(look, number=n)] for n in range(5)]) == [[Result(str(n))] for n in range(5)]
    runner.run([[request(look, number=1)]])
    assert len(loops) == 1


def test_a_promise_that_is_late_is_cancelled():
    ended, owner = [], object()

    async def wait():
        """Waits."""
        try:
            await asyncio.sleep(100)
        finally:
            ended.append(True)

    async def own():
        """Has a limit of its own."""
        await asyncio.wait_for(asyncio.sleep(100), 0.01)

    runner = Runner(ToolOptions(time_limit=0.3))
    [[late, other]] = runner.run([[request(wait, owner), request(things.double, owner, number=1)]])
    assert (late.reason, other.text, ended) == ("time_limit", "2", [True])
    assert once(own).reason == "raised"


def test_a_promise_that_blocks_its_loop_does_not_take_the_others_down():
    release = threading.Event()

    async def block():
        """Blocks."""
        release.wait(30)

    runner = Runner(ToolOptions(time_limit=0.3))
    assert runner.run([[request(block)]])[0][0].reason == "time_limit"
    assert runner.run([[request(things.promise, number=3)]]) == [[Result("[3]")]]
    release.set()


def test_what_tools_print_is_not_seen(capsys):
    release = threading.Event()

    def chatter():
        """Chatters."""
        print("TOOL")
        print("TOOL", file=sys.stderr)
        sys.stdout.writelines(["TOOL"])
        sys.stdout.flush()
        release.wait(0.5)
        print("TOOL, late")

    before = sys.stdout
    watching = threading.Thread(target=lambda: (time.sleep(0.05), print("PROGRESS")))
    watching.start()
    runner = Runner(ToolOptions(time_limit=0.2))
    runner.run([[request(chatter)]])
    watching.join()
    release.set()
    join_tools()
    print("AFTER")
    runner.run([[request(things.double, number=1)]])
    assert sys.stdout is before
    shown = capsys.readouterr()
    assert shown.out == "PROGRESS\nAFTER\n"
    assert shown.err == ""


def test_jobs_keep_their_values():
    value = object()
    [[good, bad]] = Runner().outcomes([[Job(lambda: value), Job(lambda: 1 / 0)]])
    assert good.value is value
    assert (bad.value, bad.error, bad.reason) == (None, "Error: ZeroDivisionError: division by zero", "raised")


@pytest.mark.slow
def test_a_process_ends_although_a_tool_hangs():
    code = """
import threading
from alignment_modules.rollouts.environments import Job, Runner, ToolOptions
[[outcome]] = Runner(ToolOptions(time_limit=0.2)).outcomes([[Job(threading.Event().wait)]])
print(outcome.reason)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "time_limit\n"


def test_processes():
    """One scenario, as each process costs its start."""
    path = f"{things.__name__}.misbehave"
    known = {"misbehave": tool_of(things.misbehave, "x", path=path)}
    runner = Runner(ToolOptions(in_process=False, time_limit=2.0, max_result_length=10))

    def ask(*hows):
        [results] = runner.run([[Request(Call("misbehave", {"how": how}), known) for how in hows]])
        return results

    first, *rest = ask("process", "raise", "exit", "print", "read", "large", "bytes", "process")
    assert rest[0] == Result("Error: KeyError: 'gone'", True, "raised")
    assert rest[1] == Result("Error: SystemExit: 3", True, "raised")
    assert rest[2] == Result("done")
    assert rest[3].text.startswith("Error: EOFError")
    assert rest[4].text.endswith("[cut: 4999680 of 5000000 characters]")
    assert rest[5] == Result("\ufffd\ufffd ok")
    assert rest[6] == first  # all in one process
    died, closed, hung, after = ask("die", "close", "hang", "process")
    assert died == Result("Error: the process of the tool died (exit status 3)", True, "died")
    assert closed.reason == "died"
    assert hung == Result("Error: no answer within 2 seconds", True, "time_limit")
    assert after.text.isdigit()
    assert after != first
    again, hung = ask("process", "hang")
    assert (again, hung.reason) == (after, "time_limit")
    with pytest.raises(ProcessLookupError):  # what was late is ended
        os.kill(int(again.text), 0)
    others = {"promise": tool_of(things.promise, "x", path=f"{things.__name__}.promise")}
    [[promised]] = runner.run([[Request(Call("promise", {"number": 2}), others)]])
    assert promised == Result("[2]")
    others = {"gone": tool_of(things.double, "x", path=f"{things.__name__}.gone")}
    [[gone]] = runner.run([[Request(Call("gone", {"number": 2}), others)]])
    assert gone.text.startswith("Error: AttributeError")
    [last] = ask("process")
    os.kill(int(last.text), 0)
    runner.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(last.text), 0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"time_limit": 0}, "tool_options.time_limit=0 must be"),
        ({"max_workers": 0}, "tool_options.max_workers=0 must be"),
        ({"max_result_length": 0}, "tool_options.max_result_length=0 must be"),
        ({"in_process": "no"}, "tool_options.in_process='no' must be true or false"),
        ({"format": 3}, "tool_options.format=3 must be"),
    ],
)
def test_options(options, told):
    with pytest.raises(ValueError, match=told):
        ToolOptions(**options)
