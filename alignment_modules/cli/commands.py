"""Commands beside those of the Trainer: each a function of its arguments, imported when it is called."""

import importlib
from collections.abc import Callable

COMMANDS = {"inspect": "alignment_modules.cli.inspect:inspect_command"}
"""Where each command's function is, by name."""


def run_command(name: str, arguments: list[str]) -> int:
    """Runs a command of `COMMANDS`.

    Args:
        name: Which.
        arguments: What follows its name on the command line.

    Returns:
        The exit code.
    """
    module, _, function = COMMANDS[name].partition(":")
    command: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return command(arguments)
