"""Where the modules of 0.1 are now: a class path in a configuration or a checkpoint is public."""

import re
from collections.abc import Mapping
from typing import Any

_HERE = "alignment_modules"
MOVED = {
    **{f"{_HERE}.{name}": f"{_HERE}.paradigms.{name}" for name in ("pretrain", "sft", "dpo", "grpo")},
    f"{_HERE}.base": f"{_HERE}.training.module",
    f"{_HERE}.optimization": f"{_HERE}.training.schedules",
    f"{_HERE}.callbacks.atomic_checkpoint": f"{_HERE}.training.checkpoint_io",
}
"""The old name of a module, and the new one."""

_OLD = re.compile(rf"\b({'|'.join(map(re.escape, sorted(MOVED, key=len, reverse=True)))})\.([A-Z]\w*)")


def new_paths(text: str) -> dict[str, str]:
    """The class paths in a text that were right in 0.1, each with what it is now.

    Args:
        text: A class path, or an error that names some.

    Example:
        >>> new_paths("alignment_modules.optimization.CosineSchedule")
        {'alignment_modules.optimization.CosineSchedule': 'alignment_modules.training.schedules.CosineSchedule'}
    """
    return {match[0]: f"{MOVED[match[1]]}.{match[2]}" for match in _OLD.finditer(text)}


def tell_moved(tree: Any) -> str:
    """A sentence on each class path in a tree of options that has moved; "" without any.

    Args:
        tree: Mappings, sequences and plain values.
    """
    if isinstance(tree, Mapping):
        return " ".join(filter(None, map(tell_moved, tree.values())))
    if isinstance(tree, list | tuple):
        return " ".join(filter(None, map(tell_moved, tree)))
    found = new_paths(tree) if isinstance(tree, str) else {}
    return " ".join(f"{old} has moved: it is {new} now." for old, new in found.items())
