"""Commands of `align` beside Lightning's own: which there are, and where each is."""

import importlib
from collections.abc import Callable

COMMANDS = {
    "cache": "alignment_modules.cli.cache:cache_command",
    "chat": "alignment_modules.cli.chat:chat_command",
    "convert": "alignment_modules.cli.converting.convert:convert_command",
    "export": "alignment_modules.cli.export:export_command",
    "generate": "alignment_modules.cli.generate:generate_command",
    "inspect": "alignment_modules.cli.inspect:inspect_command",
}
"""Name of each command, and its function as "module:function": from arguments to the program's exit code."""


def run_command(name: str, arguments: list[str]) -> int:
    """Runs a command; what it needs is imported only now.

    Args:
        name: One of `COMMANDS`.
        arguments: What follows the name on the command line.

    Returns:
        The program's exit code.
    """
    module, _, function = COMMANDS[name].partition(":")
    command: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return command(arguments)
