"""Short answers to mistakes on the command line: the option, its value, what is allowed, and where to read more.

jsonargparse tells which alternative of which union failed, below the usage of every option there is. Here the one line
that matters is picked out of that and completed with what would have been accepted and what comes close to it.
"""

import ast
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from alignment_modules.cli_classes import (
    BASES,
    bases_of,
    choices,
    import_path,
    know_short_names,
    last,
    lengthen_argument,
    option_names,
    options_of,
    path_of,
    subclasses,
)
from alignment_modules.cli_help import print_help
from alignment_modules.cli_hints import instead
from alignment_modules.functional.ranges import describe

_LONGEST = 300  # characters of a value or of a list of what is allowed

_NO_OPTION = re.compile(
    r"(?:Subcommand '.+' does not accept option|Option|Group '.+' does not accept option) '([^']+)'"
    r"|unrecognized arguments: --([^=\s]+)"
)
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_NO_ATTRIBUTE = re.compile(r"module '([^']+)' has no attribute '([^']+)'(?:\. Got value: .*)?")
_NO_MODULE = re.compile(r"No module named '([^']+)'")
_NO_SUBCLASS = re.compile(r"Import path (?:\S+ )?does not correspond to a subclass of (\w+)")
_NO_PATH = re.compile(r"Expected a dot import path string: (.+)")
_TYPE = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$")
_CALLABLE = re.compile(r"(?:Type .+ expects a function or a callable class: )(.+)")
_GOT_CLASS = re.compile(r"\. Got value: Namespace\(class_path='([^']+)'.*")
_GIVEN_CLASS = re.compile(r"Given value: Namespace\(class_path='([^']+)'")
_AMBIGUOUS = re.compile(r"Multiple subclasses with name (\w+)\. Give the full class path to avoid ambiguity: (.+)\.")
_WRAPPING = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Expected a",
    "Problem with given class_path",
    "Type ",
)
_NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Given value type:", "Expected a path but")


class AlignArgumentParser(LightningArgumentParser):
    """Parser whose errors take a few lines. Options must be written out: an abbreviation may become ambiguous later."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        know_short_names()
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self._given: list[str] = []

    def add_subclass_arguments(self, baseclass: Any, nested_key: str, *args: Any, **keywords: Any) -> Any:
        """Adds the options of a class; a data module's sources are paths of data, not of more configuration.

        jsonargparse would read any file given for a class-typed option as YAML, and put its content in place of its
        name.
        """
        result = super().add_subclass_arguments(baseclass, nested_key, *args, **keywords)
        for action in self._actions:
            if action.dest == nested_key == "data":
                action.sub_add_kwargs = action.sub_add_kwargs | {"sub_configs": False}
        return result

    def parse_args(self, args: Any = None, *more: Any, **keywords: Any) -> Any:
        """Parses, and remembers what was given, to name it in an error."""
        given = sys.argv[1:] if args is None else args
        if not isinstance(given, list | tuple):  # Lightning also takes a dictionary or a Namespace
            return super().parse_args(args, *more, **keywords)
        self._given = [str(argument) for argument in given]
        try:
            print_help(self, self._given)
        except ValueError as error:
            self.error(str(error))
        self._refuse_bases()
        return super().parse_args([lengthen_argument(argument) for argument in self._given], *more, **keywords)

    def _refuse_bases(self) -> None:
        bases = {name: base for base in BASES for name in (base.__name__, path_of(base))}
        for before, argument in pairwise(["", *self._given]):
            option, _, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
            if option.startswith("--") and not option.endswith("help") and value in bases:
                classes = [c.__name__ for c in choices(option.lstrip("-")) if issubclass(c, bases[value])]
                self.error(f"{option}={value}: only a base of other classes; choose one of them{_allowed(classes)}")

    def parse_path(self, path: Any, *more: Any, **keywords: Any) -> Any:
        """Reads a configuration file; a file that holds no options is refused by its name."""
        try:
            with Path(path).expanduser().open(encoding="utf-8") as file:
                options = yaml.safe_load(file)
        except OSError:
            pass  # told below
        except yaml.YAMLError as error:
            self.error(f"--config={path}: is not valid YAML: {error}")
        except UnicodeDecodeError as error:
            self.error(f"--config={path}: must be a YAML file of options, but is not text in UTF-8: {error}")
        else:
            if not isinstance(options, dict):
                found = "is empty" if options is None else f"holds a {type(options).__name__}"
                self.error(f"--config={path}: must be a YAML file of options such as 'model: ...', but {found}")
        return super().parse_path(path, *more, **keywords)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what was wrong, what is allowed and where to read more, and exits with 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        if parser is self and (action := getattr(self, "_subcommands_action", None)):
            parser = next((action.choices[name] for name in self._given if name in action.choices), self)
        if message.startswith("Problems parsing config"):
            files = [second for first, second in pairwise(self._given) if first in ("-c", "--config")]
            message = f"--config={', '.join(files)}: is not valid YAML: {message}" if files else message
        sys.stderr.write(f"{_program(parser)}: error: {explain(parser, message)}\n  help: {_program(parser)} --help\n")
        sys.exit(2)


def find_cause(error: BaseException) -> BaseException:
    """The error that was raised inside a class's constructor, which jsonargparse wraps in the unions it tried.

    Args:
        error: What jsonargparse raised.

    Returns:
        The outermost error that is no wrapping; where the wrapping alone is left, what it says.
    """
    link: BaseException | None = error
    while link is not None and str(link).startswith(_WRAPPING):
        link = link.__cause__ or link.__context__
    lines = (line.strip().removeprefix("- ") for line in str(error).splitlines())
    told = next((line for line in lines if line and not line.startswith(_WRAPPING)), str(error))
    return link or ValueError(told)


@dataclass(frozen=True)
class _Cause:
    """One line of jsonargparse's message and what it is nested in."""

    keys: tuple[str, ...]  # of the option, from the outside in
    owner: str  # import path of the class whose option it is; "" on the command line itself
    text: str


def explain(parser: ArgumentParser, message: str) -> str:
    """The message's decisive part, with what is allowed and what comes close.

    Args:
        parser: The parser that refused.
        message: What it said.

    Returns:
        A few lines; the message as it is where its form is not known.
    """
    subcommand = re.search(r"invalid choice: '(\S+)' \(choose from (.+)\)", message)
    if subcommand:
        choices = re.findall(r"[\w-]+", subcommand[2])
        return f"{subcommand[1]!r} is not a subcommand{_close(subcommand[1], choices)}{_allowed(choices)}"
    if message.startswith("unrecognized arguments: "):
        given = message.removeprefix("unrecognized arguments: ")
        options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        name = given.split("=")[0].split(" ")[0]
        hint = _close(name, options) if name.startswith("--") else "; every option starts with --"
        other = instead(name) if name.startswith("--") else None
        return f"{_cut(given)}: there is no such option{f'; use --{other}' if other else hint}"
    causes, value = _read(message)
    if not causes:
        return message
    cause = max(causes, key=_rank)
    peers = [other for other in causes if other.keys == cause.keys]
    return (
        _option_error(parser, cause, value)
        or _class_error(parser, cause, value)
        or _type_error(parser, peers, value)
        or message
    )


def _read(message: str) -> tuple[list[_Cause], str]:
    """The causes of a nested message, and the value that was given at its outermost level."""
    causes: list[_Cause] = []
    value, stack = "", list[tuple[int, str, str]]()
    lines = message.splitlines()
    for number, line in enumerate(lines):
        text = line.lstrip(" ").removeprefix("- ")
        indent = len(line) - len(text)
        called = _CALLABLE.fullmatch(text)
        got = _GOT_CLASS.search(text)
        text = _GOT_CLASS.sub("", called[1] if called else text)
        if not text or text.startswith(_NOISE):
            continue
        while stack and stack[-1][0] >= indent:
            stack.pop()
        if called and (path := got[1] if got else _class_of(lines[number:])):
            stack.append((indent, "owner", path))
        key = re.fullmatch(r'Parser key "([^"]+)":\s*(.*)', text)
        owner = re.fullmatch(r"Problem with given class_path '([^']+)':", text)
        if text.startswith("Given value: "):
            value = text.removeprefix("Given value: ")
        elif owner:
            stack.append((indent, "owner", owner[1]))
        elif key and not key[2]:
            stack.append((indent, "key", key[1]))
        else:
            keys = [name for _, kind, name in stack if kind == "key"] + ([key[1]] if key else [])
            owners = [name for _, kind, name in stack if kind == "owner"]
            text = key[2] if key else text
            causes.append(_Cause(tuple(keys), owners[-1] if owners else "", text))
    return causes, value


def _class_of(lines: list[str]) -> str:
    """Import path of the class whose options the lines are about: named where the first of them ends."""
    found = (_GOT_CLASS.search(line) or _GIVEN_CLASS.search(line) for line in lines)
    return next((match[1] for match in found if match), "")


def _rank(cause: _Cause) -> tuple[bool, int, int]:
    """How far the branch of a union got, and how much it says there."""
    weight = _weight(cause.text)
    return weight > 0, len(cause.keys), weight


def _weight(text: str) -> int:
    """How much a line says."""
    if "NoneType" in text:
        return 0
    ranks = ((_NO_OPTION, 5), (_REQUIRED, 5), (_AMBIGUOUS, 5), (_NO_ATTRIBUTE, 4), (_NO_MODULE, 4), (_NO_SUBCLASS, 3))
    named = next((rank for pattern, rank in ranks if pattern.match(text)), 0)
    return named or (2 if _NO_PATH.match(text) or "Got value" in text else 1)


def _option_error(parser: ArgumentParser, cause: _Cause, value: str) -> str | None:
    unknown, required = _NO_OPTION.match(cause.text), _REQUIRED.match(cause.text)
    owner = last(cause.owner)
    more = f"\n  help: {_program(parser)} --{cause.keys[0]}.help {owner}" if owner and len(cause.keys) == 1 else ""
    if required:
        names = [".".join([*cause.keys, name]) for name in required[1].split(", ")]
        names = [f"--{re.sub('^(fit|validate|test|predict)[.]', '', name)}" for name in names]
        return f"{', '.join(names)}: required{f' by {owner}' if owner else ''}, but not given{more}"
    if not unknown:
        return None
    name = unknown[1] or unknown[2]
    if owner:
        options = option_names(import_path(cause.owner))
        name = name if name in options else re.sub(r"\.(class_path|init_args)\b.*", "", name)
        first, final = name.partition(".")[0], last(name)
        where, said = ".".join([*cause.keys, name]), f"{owner} has no option {first!r}"
        if owner == "LightningDataModule":  # --data itself was forgotten
            classes = [c.__name__ for c in choices("data")]
            said = f"name the data module first, such as --data SFTDataModule{_allowed(classes)}"
            return f"--{where}{_shown(_find(value, final))}: {said}"
        other = None if first in options or _close(first, options) else instead(where)
        hint = f"; use --{other}" if other else _close(first, options)
        return f"--{where}{_shown(_find(value, final))}: {said}{hint}{_allowed(options)}{more}"
    siblings = [action.dest for action in parser._actions]
    parent = name.rpartition(".")[0]
    options = [dest for dest in siblings if dest.rpartition(".")[0] == parent and not dest.endswith("help")]
    options = [dest.rpartition(".")[2] for dest in options]
    said = f"there is no such option{f' of {parent}' if parent else ''}"
    other, close = instead(name), _close(last(name), options)
    return f"--{name}: {said}{f'; use --{other}' if other and not close else close}{_allowed(options)}"


def _class_error(parser: ArgumentParser, cause: _Cause, value: str) -> str | None:
    attribute, missing = _NO_ATTRIBUTE.match(cause.text), _NO_MODULE.match(cause.text)
    path, subclass = _NO_PATH.match(cause.text), _NO_SUBCLASS.match(cause.text)
    option = "--" + ".".join(cause.keys)
    if ambiguous := _AMBIGUOUS.match(cause.text):
        return f"{option}={ambiguous[1]}: several classes have this name; give its whole path: {ambiguous[2]}"
    if attribute:
        names = [name for name in dir(importlib.import_module(attribute[1])) if not name.startswith("_")]
        said = f"module {attribute[1]!r} has no {attribute[2]!r}"
        return f"{option}={attribute[1]}.{attribute[2]}: {said}{_close(attribute[2], names)}"
    if missing:
        given = cause.owner or _find(value, cause.keys[-1])
        hint = "a file of your own must lie in the current folder or on PYTHONPATH"
        return f"{option}{_shown(given)}: there is no module {missing[1]!r}; {hint}"
    if not (path or subclass):
        return None
    given = path[1] if path else _find(value, cause.keys[-1])
    bases = bases_of(_typehint(parser, cause))
    if not bases and path:  # a number, say: no class was asked for
        return None
    classes = sorted(map(path_of, subclasses(bases)), key=str.lower)
    wanted = f"a subclass of {subclass[1]}" if subclass else "a class that this option takes"
    close = _close(last(given), map(last, classes))
    # Ours where there are any, else those that come with the base class; not what other packages derive from it.
    at_home = {base.__module__.partition(".")[0] for base in bases}
    for packages in ({"alignment_modules", "datamodules"}, at_home):
        names = [last(path) for path in classes if path.partition(".")[0] in packages]
        if names:
            break
    return f"{option}{_shown(given)}: not the name or import path of {wanted}{close}{_allowed(names)}"


def _type_error(parser: ArgumentParser, causes: list[_Cause], value: str) -> str | None:
    matches = [match for cause in causes if not _NO_PATH.match(cause.text) and (match := _TYPE.match(cause.text))]
    if not matches:
        cause = causes[0]
        return f"--{'.'.join(cause.keys)}: {cause.text}" if len(causes) == 1 and cause.keys else None
    keys = causes[0].keys
    given = next((match[2] for match in matches if match[2]), None) or _find(value, keys[-1] if keys else "")
    typehint = _typehint(parser, causes[0])
    if "Range(" in str(typehint):
        return f"--{'.'.join(keys)}{_shown(given)}: must be {describe(typehint)}"
    kinds = [re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", match[1]).replace("NoneType", "null") for match in matches]
    kinds = [re.sub(r"^typing\.Literal\[(.*)\]$", r"one of \1", kind) for kind in dict.fromkeys(kinds)]
    return f"--{'.'.join(keys)}{_shown(given)}: must be {' or '.join(kinds)}"


def _find(value: str, name: str) -> str:
    """The value given to option `name`, from jsonargparse's rendering of what it was given; "" if it cannot be told."""
    nested = re.fullmatch(r"NestedArg\(key='([^']*)', val='?(.*?)'?\)", value)
    if nested:
        return nested[2] if nested[1].rpartition(".")[2] == name else ""
    try:
        return _search(ast.literal_eval(value), name) or ("" if "class_path" in value else value)
    except (ValueError, SyntaxError):
        plain = re.match(r"[\w(){}\[\]]+\(", value)
        return "" if plain else value


def _search(tree: Any, name: str) -> str:
    if isinstance(tree, dict):
        if name in tree:
            return str(tree[name])
        tree = list(tree.values())
    if isinstance(tree, list):
        return next((found for branch in tree if (found := _search(branch, name))), "")
    return ""


def _program(parser: ArgumentParser) -> str:
    return parser.prog.replace(" [options]", "")


def _typehint(parser: ArgumentParser, cause: _Cause) -> Any:
    if cause.owner and len(cause.keys) > 1:
        owner = import_path(cause.owner)
        options = options_of(owner) if inspect.isclass(owner) else []
        return next((hint for _, parameter, hint, _ in options if parameter.name == cause.keys[-1]), None)
    return next((getattr(a, "_typehint", None) for a in parser._actions if a.dest == cause.keys[0]), None)


def _close(name: str, names: Iterable[str]) -> str:
    folded = {candidate.lower(): candidate for candidate in names}
    found = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    return f"; did you mean {folded[found[0]]!r}?" if found else ""


def _allowed(names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    return f"\n  allowed: {_cut(', '.join(names))}" if names else ""


def _shown(value: str) -> str:
    return f"={_cut(value)}" if value else ""


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
