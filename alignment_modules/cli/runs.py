"""What the command line knows of a run's files: where its checkpoints may be, and how it is resumed."""

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from alignment_modules.cli.run_folder import last_checkpoint
from alignment_modules.training.best import best_of_state
from alignment_modules.training.sharded_checkpoints import open_checkpoint


def resume_command(arguments: Sequence[str]) -> str:
    """The command that goes on with a run, in words.

    Args:
        arguments: The command's arguments after `align`.
    """
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith("--ckpt_path"):
            kept.append(argument)
        skip = argument == "--ckpt_path"
    return f"with: {shlex.join(['align', *kept, '--ckpt_path', 'last'])}"


def checkpoint_folders(config: Namespace) -> list[Path]:
    """Where a run's checkpoints may be beside its own folder: callbacks' `dirpath` and loggers' `save_dir`.

    Args:
        config: A subcommand's configuration.
    """
    trainer = config.trainer
    entries = [trainer.get("callbacks"), trainer.get("logger")]
    flat = [part for entry in entries for part in (entry if isinstance(entry, list) else [entry])]
    options = [part.get("init_args") or {} for part in flat if isinstance(part, Namespace)]
    names = [
        option.get(key) for option in [*options, config.get("checkpoints") or {}] for key in ("dirpath", "save_dir")
    ]
    return [Path(name) for name in names if isinstance(name, str) and "://" not in name]


def checkpoint_meant(config: Namespace) -> str | None:
    """The checkpoint that a command's `ckpt_path` means; `last` and `best` are of the run in its folder.

    Args:
        config: A subcommand's configuration.

    Raises:
        ValueError: If there is none, or nothing says which is the best.
    """
    name = config.get("ckpt_path")
    if name not in ("last", "best"):
        return name
    last = last_checkpoint(Path(config.trainer.default_root_dir), checkpoint_folders(config), name)
    if name == "last":
        return str(last)
    return str(best_of_state(open_checkpoint(last)[0].get("callbacks", {}), last, "ckpt_path").path)


def is_of_run(checkpoint: str | None, folders: Sequence[Path]) -> bool:
    """Whether a fit goes on with the run in its folder; what only Lightning can find counts as that.

    Args:
        checkpoint: What it is to start from.
        folders: Where that run's checkpoints may be.
    """
    if checkpoint is None:
        return False
    path = Path(checkpoint).resolve()
    return not path.exists() or any(folder.expanduser().resolve() in path.parents for folder in folders)


def follow_parent(parent: int) -> None:
    """Ends this process with the one that started it, also where it waits for that one in a library's own code.

    Args:
        parent: Process id of that one.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(143)
