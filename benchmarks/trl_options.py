"""Options of TRL's commands with their defaults, as `align convert` reads them: run where TRL is installed.

    .venv-trl/bin/python benchmarks/trl_options.py > alignment_modules/cli/converting/trl_options.json

TRL's commands `sft`, `dpo` and so on read one flat file of options, those of its script, of the trainer's
configuration, of the model and of the data. This writes their names and defaults, of every command apart from what all
share.
"""

import dataclasses
import enum
import importlib
import json
import sys
from typing import Any

COMMANDS = ("sft", "dpo", "kto", "reward", "grpo", "rloo")
OTHERS = ("orpo.ORPOConfig", "cpo.CPOConfig", "online_dpo.OnlineDPOConfig", "gkd.GKDConfig")
"""Configurations of `trl.experimental` that no command reads, of which the names alone are noted."""


def options(command: str) -> dict[str, Any]:
    """Names and defaults of what a command of TRL's reads."""
    parser = importlib.import_module(f"trl.scripts.{command}").make_parser()
    return {
        field.name: default(field)
        for kind in parser.dataclass_types
        for field in dataclasses.fields(kind)
        if field.init
    }


def default(field: dataclasses.Field[Any]) -> Any:
    """What holds where the option is not given, as a value that JSON has."""
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if made is dataclasses.MISSING:
        return None
    return made.value if isinstance(made, enum.Enum) else made


def main() -> None:
    """Prints all of them."""
    import trl

    found = {command: options(command) for command in COMMANDS}
    first = found[COMMANDS[0]]
    shared = {
        name: value
        for name, value in first.items()
        if all(name in one and one[name] == value for one in found.values())
    }
    own = {
        command: {name: value for name, value in one.items() if name not in shared} for command, one in found.items()
    }
    others = {}
    for other in OTHERS:
        module, name = other.split(".")
        kind = getattr(importlib.import_module(f"trl.experimental.{module}"), name)
        others[name] = sorted({field.name for field in dataclasses.fields(kind) if field.init} - set(shared))
    everything = {"version": trl.__version__, "all": shared, "others": others, **own}
    json.dump(everything, sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
