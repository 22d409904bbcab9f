"""What decides a table's content, as plain values: equal values mean equal tables."""

from __future__ import annotations

import functools
import hashlib
import inspect
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datamodules
from datamodules.cache.store import FORMAT
from datamodules.reading import SplitReader
from datamodules.text.encoding import written_backend

_LIBRARIES = ("tokenizers", "transformers", "jinja2")


def lines_key(identity: Any, kind: str) -> dict[str, Any]:
    """Of what is found in a file.

    Args:
        identity: The file's.
        kind: What is looked for.
    """
    return {"what": kind, "file": identity, "format": FORMAT, "code": _code()}


def table_key(data: Any, reader: SplitReader, prompts: bool) -> dict[str, Any] | None:
    """Of a split's table.

    Args:
        data: The data module.
        reader: The split.
        prompts: Whether it is a table of prompts alone, which are the same in all data modules.

    Returns:
        Plain values; None where two tables cannot be told from each other: of rows without an identity, of a tokenizer
        that cannot be written down, and of a class of the user's that does not say which of its options count.
    """
    rows, tokenizer = reader.rows.identity(), _tokenizer(reader.encoder.tokenizer)
    maker = "prompts" if prompts else _maker(data)
    if rows is None or tokenizer is None or maker is None:
        return None
    return {
        "rows": rows,
        "tokenizer": tokenizer,
        "maker": maker,
        "options": [reader.kind, reader.labelled, reader.as_chat, reader.max_length, reader.overflow],
        "format": FORMAT,
        "code": _code(),
        "libraries": [_version(name) for name in _LIBRARIES],
    }


def _maker(data: Any) -> list[Any] | None:
    """The class that makes the table, its options, and the code of those parts of it that are the user's."""
    libraries = ("datamodules.", "lightning.", "torch.")
    own = [base for base in type(data).__mro__[:-1] if not base.__module__.startswith(libraries)]
    if own:
        builds = next(base for base in type(data).__mro__ if "build" in vars(base))
        says = next(base for base in type(data).__mro__ if "table_options" in vars(base))
        if builds in own and not issubclass(says, builds):
            return None
    try:
        sources = [inspect.getsource(base) for base in own]
    except (OSError, TypeError):
        return None
    code = hashlib.sha256("\n".join(sources).encode()).hexdigest()
    return [f"{type(data).__module__}.{type(data).__qualname__}", code, dict(data.table_options())]


def _tokenizer(tokenizer: Any) -> str | None:
    """A hash of all that decides a tokenizer's ids; None where it has no form to write."""
    content = written_backend(tokenizer)
    if content is None:
        return None
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    given = {n: value for n, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int | float)}
    parts = [content, type(tokenizer).__name__, repr(tokenizer.chat_template)]
    parts += [repr(sorted(values.items())) for values in (named, given)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """A hash of this package's files: what another state of them made is made again."""
    folder, total = Path(datamodules.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
