"""Options of the commands that need no configuration file."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class OptionParser(argparse.ArgumentParser):
    """argparse with whole option names alone, written with `-` or `_`, and errors as those of `align fit`.

    Args:
        name: Name of the command.
        usage: What follows `align NAME`.
        description: Text before the options.
        epilog: Text behind them.
    """

    def __init__(self, name: str, usage: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"align {name}",
            usage=f"align {name} {usage}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parses; `--top_p` is `--top-p`."""
        return super().parse_args([_dashed(one) for one in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message: str) -> NoReturn:
        """Prints what was wrong and where to read more, and exits with 2."""
        unknown = message.removeprefix("unrecognized arguments: ").split("=")[0].split()
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        near = difflib.get_close_matches(unknown[0], known, n=1) if "unrecognized" in message and unknown else []
        hint = f"; did you mean {near[0]}?" if near else ""
        sys.stderr.write(f"{self.prog}: error: {message}{hint}\n  help: {self.prog} --help\n")
        sys.exit(2)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def _dashed(argument: str) -> str:
    option, equals, value = argument.partition("=")
    return f"{option.replace('_', '-')}{equals}{value}" if option.startswith("--") else argument
