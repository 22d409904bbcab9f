"""Options that name an object of Python by its path, such as "my_package.rewards.brevity"."""

import importlib
import re
from typing import Any

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def is_import_path(text: str) -> bool:
    """Whether a text has the form of an import path: names with dots between them.

    >>> is_import_path("package.module.name"), is_import_path("owner/name"), is_import_path("name")
    (True, False, False)
    """
    return _IMPORT_PATH.fullmatch(text) is not None


def import_object(path: str, label: str, more: str = "") -> Any:
    """What an import path names.

    Args:
        path: Module and attribute, with a dot between them.
        label: The option with its value, for messages.
        more: What else the value could have been and is not, such as " and no folder of that name".

    Returns:
        The attribute.

    Raises:
        ValueError: If there is no such module, or no such attribute in it.
        ModuleNotFoundError: If the module is there and imports one that is not.
    """
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # a module that is there but imports something that is not must not be reported as missing itself
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise ValueError(
            f"{label}: no module named {error.name!r}{more}; a file of your own must lie on Python's path (PYTHONPATH, "
            "an installed package; for `align` also the working folder, and that of a configuration)"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"{label}: module {module_name!r} has no attribute {attribute!r}")
    return getattr(module, attribute)
