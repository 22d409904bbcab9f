"""Where options are wrong: names that are not there, classes that do not fit, values of another type, gaps."""

import difflib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from alignment_modules.cli.classes import (
    CLASSES_ONLY,
    OURS,
    choices,
    import_path,
    last,
    option_names,
    options_of,
    path_of,
    takes_classes,
)
from alignment_modules.cli.given import STRAY, Text
from alignment_modules.cli.hints import instead
from alignment_modules.functional.ranges import describe, fits
from alignment_modules.training.moved import new_paths
from datamodules import AlignmentDataModule, MixtureSource

_LONGEST = 300  # characters of a value or of a list of what is allowed
OPTIONAL = ("bitsandbytes", "torchao")
"""Packages whose classes an option may name, and that are installed by whoever wants them."""


def mistakes(parser: ArgumentParser, tree: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the options of a command, a message each.

    Args:
        parser: The parser of the command.
        tree: What was given, as `given_options` has it.
    """
    options = list(dict.fromkeys(action.dest for action in parser._actions))
    for key, value in tree.items():
        group = [last(option) for option in options if option.rpartition(".")[0] == key and not option.endswith("help")]
        if key == STRAY:
            yield f"{value}: there is no such option; every option starts with --"
        elif key in options and choices(key):
            yield from _in_class(key, value, None)
        elif group and isinstance(value, dict):
            yield from _in_group(key, value, group)
        elif key not in options and not group:
            yield _unknown(key, value, "", [option for option in options if "." not in option]).split("\n")[0]


def _in_group(group: str, given: dict[str, Any], names: Iterable[str]) -> Iterator[str]:
    """The Trainer's options, or those of a callback that every run has."""
    hints = {p.name: hint for _, p, hint, _ in options_of(Trainer)} if group == "trainer" else {}
    for name, value in given.items():
        if name not in names:
            yield _unknown(f"{group}.{name}", value, f" of {group}", names)
        elif choices(name):
            yield from _in_class(f"{group}.{name}", value, hints.get(name))
        elif name in hints:
            yield from _in_value(f"{group}.{name}", value, hints[name])


def _in_class(option: str, value: Any, hint: Any, default: Any = None, kind: str | None = None) -> Iterator[str]:
    name = kind or last(option)
    known = choices(name)
    read = value.read() if isinstance(value, Text) else value
    if isinstance(read, list) and read and (hint is None or list in _kinds(hint)):
        for entry in read:
            if isinstance(entry, dict | str):
                yield from _in_class(option, entry, hint)
            else:
                yield f"--{option}{_shown(entry)}: must be {_wanted(name, hint)}"
        return
    if isinstance(read, str) and name not in CLASSES_ONLY:
        if hint is not None and str not in _kinds(hint):
            yield f"--{option}{_shown(read)}: must be {_wanted(name, hint)}"
        return
    if not isinstance(read, dict | str):
        if any(fits(read, a) for a in _alternatives(hint) if get_origin(a) is Annotated):
            return
        if hint is None or read is not None or NoneType not in _kinds(hint):
            yield f"--{option}{_shown(read)}: must be {_wanted(name, hint)}"
        return
    if isinstance(read, str):
        path, given = read, dict[str, Any]()
    elif "class_path" in read or "init_args" in read:
        path, given = str(read.get("class_path") or ""), read.get("init_args") or {}
    else:
        path, given = "", read
    if not path and _several(given, known, hint):
        for key, entry in given.items():
            yield from _in_entry(f"{option}.{key}", entry, known[0], hint)
        return
    if not path and name == "data":
        where, value = _deepest(option, given)
        names = allowed(c.__name__ for c in known)
        yield f"--{where}{_shown(value)}: name the data module first, such as --data SFTDataModule{names}"
        return
    if not path:
        cls = known[0] if len(known) == 1 else default if inspect.isclass(default) else None
    else:
        cls = yield from _find(option, path, known, CLASSES_ONLY.get(name))
    if cls is not None:
        yield from _in_options(option, cls, given)


def _in_entry(option: str, value: Any, cls: type, hint: Any) -> Iterator[str]:
    """One of several values under names of the user's: a class's options, or what else their type allows."""
    read = value.read() if isinstance(value, Text) else value
    named = isinstance(read, str) or (isinstance(read, dict) and bool({"class_path", "init_args"} & {*read}))
    if named and cls is MixtureSource:  # its data module alone
        yield from _in_class(option, value, AlignmentDataModule, kind="data")
    elif cls is MixtureSource and isinstance(read, dict) and "data" not in read:
        yield f"--{option}{_shown(read)}: has no `data`; name its data module, as in class_path: SFTDataModule"
    elif isinstance(read, dict):
        yield from _in_options(option, cls, read)
    elif not isinstance(read, str):
        yield f"--{option}{_shown(read)}: must be {_wanted(last(option), hint)}"


def _several(given: dict[str, Any], known: list[type], hint: Any) -> bool:
    """Whether values of a class by names of the user's are given, not the class's options."""
    kinds = _kinds(hint)
    known_names = set() if kinds == {dict} else {*option_names(known[0])} if len(known) == 1 else set(given)
    return dict in kinds and bool(given) and not {*given} & known_names


def _in_options(option: str, cls: type, given: dict[str, Any]) -> Iterator[str]:
    """The options of one class."""
    names = option_names(cls)
    found = {p.name: (p, hint) for _, p, hint, _ in options_of(cls)}
    for name, value in given.items():
        if name not in names:
            more = f"\n  help: align fit --{option}.help {cls.__name__}" if "." not in option else ""
            yield _unknown(f"{option}.{name}", value, cls.__name__, names) + more
        elif name in found and takes_classes(name, found[name][1]):
            yield from _in_class(f"{option}.{name}", value, found[name][1], found[name][0].default)
        elif name in found:
            yield from _in_value(f"{option}.{name}", value, found[name][1])
    missing = [name for name, (p, _) in found.items() if p.default is p.empty and name not in given]
    if missing and not is_dataclass(cls):
        yield f"{', '.join(f'--{option}.{name}' for name in missing)}: required by {cls.__name__}, but not given"


def _in_value(option: str, value: Any, hint: Any) -> Iterator[str]:
    """A plain value, or the options of a dataclass; of a union no other class counts: none is written as plain text."""
    read = value.read() if isinstance(value, Text) else value
    options = [a for a in _alternatives(hint) if is_dataclass(a) and isinstance(a, type)]
    if options and isinstance(read, dict):
        yield from _in_options(option, options[0], read)
        return
    plain = [a for a in _alternatives(hint) if a in (int, float, bool, str, NoneType) or get_origin(a) is not None]
    if plain and not any(_means(form, a) for a in plain for form in (read, value)):
        yield f"--{option}{_shown(value)}: must be {' or '.join(dict.fromkeys(map(describe, plain)))}"


def _means(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_means(value, argument) for argument in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(_means(entry, arguments[1]) for entry in value.values())
    if origin is list:
        return isinstance(value, list) and all(_means(entry, arguments[0]) for entry in value)
    return fits(value, hint)


def _find(option: str, path: str, known: list[type], base: type | None) -> Any:
    """Yields what is wrong with the name of a class, and returns the class where nothing is."""
    cls = next((c for c in known if path in (c.__name__, path_of(c))), None)
    if cls is not None:
        return cls
    ours = [c.__name__ for c in known if c.__module__.partition(".")[0] in OURS]
    names = ours if len(ours) > 1 else [c.__name__ for c in known]  # of optimizers nearly all are torch's
    if new := new_paths(path).get(path):
        yield f"--{option}={path}: has moved; use {new}, or its name alone: {last(path)}"
        return None
    if "." in path:
        try:
            cls = import_path(path)
        except (ImportError, AttributeError) as error:
            there, package = getattr(error, "obj", None), path.partition(".")[0]
            absent = getattr(error, "name", None) == package and package in OPTIONAL
            hint = f"; pip install {package}" if absent else close(last(path), dir(there)) if there else ""
            yield f"--{option}={path}: {error}{hint}"
            return None
        if inspect.isclass(cls) and (base is None or issubclass(cls, base)):
            return cls
        if base is None or not inspect.isclass(cls):
            return None
    wanted = f"a subclass of {base.__name__}" if base else "a class that this option takes"
    all_names = [c.__name__ for c in known]
    yield f"--{option}={path}: not the name or import path of {wanted}{close(last(path), all_names)}{allowed(names)}"
    return None


def _unknown(option: str, value: Any, owner: str, names: Iterable[str]) -> str:
    names, first = list(names), last(option)
    where, value = _deepest(option, value)
    hint = close(first, names)
    other = None if hint else instead(where)
    said = f"{owner} has no option {first!r}" if owner and " " not in owner else f"there is no such option{owner}"
    return f"--{where}{_shown(value)}: {said}{f'; use --{other}' if other else hint}{allowed(names)}"


def _deepest(option: str, value: Any) -> tuple[str, Any]:
    """The option that was typed, where it is one below another."""
    while isinstance(value, dict) and len(value) == 1 and next(iter(value)) not in ("class_path", "init_args"):
        ((name, value),) = value.items()
        option = f"{option}.{name}"
    return option, value


def _kinds(hint: Any) -> set[Any]:
    return {get_origin(a) or a for a in _alternatives(hint)}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _wanted(name: str, hint: Any) -> str:
    base = CLASSES_ONLY.get(name)
    return f"the name or import path of a subclass of {base.__name__}" if base else describe(hint)


def close(name: str, names: Iterable[str]) -> str:
    """A question whether the nearest of the names was meant; "" where none is near."""
    folded = {candidate.lower(): candidate for candidate in names}
    found = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    return f"; did you mean {folded[found[0]]!r}?" if found else ""


def allowed(names: Iterable[str]) -> str:
    """A line with the names; "" without any."""
    names = list(dict.fromkeys(names))
    return f"\n  allowed: {_cut(', '.join(names))}" if names else ""


def _shown(value: Any) -> str:
    return f"={_cut('null' if value is None else str(value))}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
