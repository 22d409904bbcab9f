"""Short answers to mistakes on the command line: the option, its value, what is allowed, and where to read more.

jsonargparse says that it refuses, and which alternative of which union failed. What was wrong is found here from what
was given and from the signatures of the classes that it is for; where that finds nothing, its words are kept.
"""

import contextlib
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from alignment_modules.cli.classes import (
    BASES,
    choices,
    know_short_names,
    last,
    lengthen_argument,
    path_of,
)
from alignment_modules.cli.commands import COMMANDS
from alignment_modules.cli.given import configs, given_options
from alignment_modules.cli.help import print_help
from alignment_modules.cli.mistakes import allowed, close, mistakes
from alignment_modules.cli.own_files import find_own_files
from alignment_modules.cli.recipes import find_configs, without_config
from alignment_modules.cli.repeated_keys import RepeatedKeyError, refuse_in_options, refuse_repeated_keys

_REQUIRED = "the following arguments are required: "  # jsonargparse's words
_WRAPPING = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Expected a",
    "Problem with given class_path",
    "Type ",
)


class AlignArgumentParser(LightningArgumentParser):
    """Parser whose errors take a few lines. Options must be written out: an abbreviation may become ambiguous later."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        know_short_names()
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self._given: list[str] = []
        self._folder = Path.cwd()
        self._tree: dict[str, Any] | None = None

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
            self._given = find_configs(self._given, self._folder)
        except ValueError as error:
            self._refuse(str(error))
        find_own_files(configs(self._given))
        self._refuse_bases()
        try:
            folders = [self._folder, *(self._folder / Path(value).parent for value in configs(self._given))]
            refuse_in_options(given_options(self._given, self._folder), folders)
        except RepeatedKeyError as error:
            self._refuse(str(error))
        return super().parse_args([lengthen_argument(argument) for argument in self._given], *more, **keywords)

    def parse_object(self, cfg_obj: Any, *more: Any, **keywords: Any) -> Any:
        """Parses a configuration, and remembers it for the same end."""
        self._tree = _copied(cfg_obj) if isinstance(cfg_obj, dict) else None  # parsing changes what it is given
        return super().parse_object(cfg_obj, *more, **keywords)

    def _refuse_bases(self) -> None:
        bases = {name: base for base in BASES for name in (base.__name__, path_of(base))}
        for before, argument in pairwise(["", *self._given]):
            option, _, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
            if option.startswith("--") and not option.endswith("help") and value in bases:
                classes = [c.__name__ for c in choices(option.lstrip("-")) if issubclass(c, bases[value])]
                self._refuse(f"{option}={value}: only a base of other classes; choose one of them{allowed(classes)}")

    def parse_path(self, path: Any, *more: Any, **keywords: Any) -> Any:
        """Reads a configuration file; a file that holds no options is refused by its name."""
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
            refuse_repeated_keys(text, f"--config={path}")
            options = yaml.safe_load(text)
        except OSError:
            pass  # told below
        except RepeatedKeyError as error:
            self._refuse(str(error))
        except yaml.YAMLError as error:
            self._refuse(f"--config={path}: is not valid YAML: {error}")
        except UnicodeDecodeError as error:
            self._refuse(f"--config={path}: must be a YAML file of options, but is not text in UTF-8: {error}")
        else:
            if not isinstance(options, dict):
                found = "is empty" if options is None else f"holds a {type(options).__name__}"
                self._refuse(f"--config={path}: must be a YAML file of options such as 'model: ...', but {found}")
        return super().parse_path(path, *more, **keywords)

    def parse_string(self, content: str, path: Any = "", *more: Any, **keywords: Any) -> Any:
        """Parses the text of a file, whose key `config` `parse_args` has followed."""
        return super().parse_string(without_config(content) if path else content, path, *more, **keywords)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what was wrong, what is allowed and where to read more, and exits with 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        commands = getattr(self, "_subcommands_action", None)
        parser = getattr(ex, "subcommand_parser", None) or self._command()
        if parser is self and commands and self._given and not self._given[0].startswith("-"):
            word, names = self._given[0], [*commands.choices, *COMMANDS, "list"]
            self._refuse(f"{word!r} is not a subcommand{close(word, names)}{allowed(names)}")
        with contextlib.suppress(Exception):  # the parser's words must not be lost over a search for better ones
            tree = given_options(self._given, self._folder) or self._tree or {}
            message = next(mistakes(parser, tree), message)
        if message.startswith(_REQUIRED):
            message = self._say_missing(message.removeprefix(_REQUIRED).split(", "))
        self._refuse(message, parser)

    def _say_missing(self, options: list[str]) -> str:
        """What to give in place of whole options that are not there, which recipes have."""
        names = " and ".join(f"--{last(option)}" for option in options)
        required = f"{names}: required, but not given"
        if not configs(self._given):
            required = f"--config NAME_OR_FILE is missing, or in its place {required}"
        return f"{required}\n  recipes, for --config: align list recipes"

    def _command(self) -> ArgumentParser:
        """The parser of the subcommand that was given; this one without any."""
        commands = getattr(self, "_subcommands_action", None)
        return next((commands.choices[name] for name in self._given if commands and name in commands.choices), self)

    def _refuse(self, message: str, parser: ArgumentParser | None = None) -> NoReturn:
        program = (parser or self._command()).prog.replace(" [options]", "")
        sys.stderr.write(f"{program}: error: {message}\n  help: {program} --help\n")
        sys.exit(2)


def _copied(tree: Any) -> Any:
    """A tree of options whose mappings and lists are its own."""
    if isinstance(tree, dict):
        return {key: _copied(branch) for key, branch in tree.items()}
    return [_copied(branch) for branch in tree] if isinstance(tree, list) else tree


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
