"""What runs in a tool's own process: one function, called with what each line of the input says.

It is started by its path, so that neither torch nor this package is imported, and answers in lines of JSON.
"""

import asyncio
import importlib
import inspect
import json
import os
import queue
import runpy
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> None:
    """Reads a line of what to import, then one of arguments for each call, until the input ends."""
    answers, lines = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what the tool prints is no answer, and what it reads is no call
        os.dup2(nothing, stream)
    results = runpy.run_path(str(Path(__file__).with_name("results.py")))
    calls: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines, calls), daemon=True).start()
    start = calls.get()
    sys.path[:] = start["sys_path"]
    module, _, name = start["path"].rpartition(".")
    function, loop, limit = None, asyncio.new_event_loop(), start["max_characters"]
    while True:
        answer = {"text": "", "failed": False}
        try:
            if function is None:
                function = getattr(importlib.import_module(module), name)
            else:
                value = function(**calls.get())
                value = loop.run_until_complete(value) if inspect.isawaitable(value) else value
                answer["text"] = results["text_of"](value, limit)
        except BaseException as error:
            answer = {"text": results["error_text"](error, limit), "failed": True}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if function is None:
            return


def _read(lines: Any, calls: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Hands on each line; where they end, whoever asked is gone, and so is this process, whatever its tool does."""
    for line in lines:
        calls.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main()
