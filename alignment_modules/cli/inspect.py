"""`align inspect`: what a model will see and how long a run will be, before it runs; no weights are read."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from alignment_modules.cli.app import AlignCLI, run_cli
from alignment_modules.cli.inspection.page import write_page
from alignment_modules.cli.inspection.run import PlannedTrainer, inspect_run
from alignment_modules.cli.inspection.text import show
from alignment_modules.functional.ranges import Natural, check_options
from alignment_modules.policies.weights import without_weights

HELP = """usage: align inspect --config NAME_OR_FILE [--OPTION VALUE ...] [--rows N] [--html FILE] [--completion TEXT]

Shows what a model will see, before training. Takes the options of `align fit`, trains nothing, reads no weights of a
model (its config.json is enough) and writes nothing but FILE.

  --rows N             rows to show, in the order of training (default 5; 0: none)
  --html FILE          also write it as one page
  --completion TEXT    GRPO: what the rewards are to judge, beside each row's own completion and an empty one

Shown are rows token by token with the targets marked; what was cut or dropped, and why; lengths, padding and packing;
batches and optimizer steps; the memory that weights, gradients and optimizer take; and what rewards say.

The exit code is 1 where `align fit` would refuse the run (an option, a row, a column that a reward asks for, a
tokenizer that does not fit the model), with the same message, and else 0. Not checked: the weights themselves,
checkpoints, what callbacks and the evaluation need, and whether activations fit into memory.

To begin with
  align inspect --config sft --model.policy.path MODEL --data.train data.jsonl

The other options: align fit --help"""


class InspectCLI(AlignCLI):
    """Parses and builds what `align fit` would, without weights, and runs nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the command's own options to those of `fit`."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--rows", type=Any, default=5, help="Rows to show.")
        parser.add_argument("--html", type=str | None, default=None, help="File to write a page to.")
        parser.add_argument("--completion", type=str | None, default=None, help="What the rewards are to judge.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses, whatever the process itself was started with."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Also checks the command's own options, and lets the Trainer be told its number of batches."""
        options = self.options
        _check(rows=options.rows)
        if options.html is not None and not Path(options.html).expanduser().absolute().parent.is_dir():
            raise ValueError(f"html={options.html!r}: there is no folder {Path(options.html).absolute().parent}")
        super().before_instantiate_classes()
        self.trainer_class = PlannedTrainer

    def _claim_folder(self, config: Namespace) -> None:
        """Leaves the run's folder alone."""

    def instantiate_classes(self) -> None:
        """Builds everything, models on the meta device."""
        with without_weights(), _warnings_only():
            super().instantiate_classes()

    def fit(self, *arguments: Any, **keywords: Any) -> None:
        """Runs nothing, in place of the Trainer's own."""

    @property
    def options(self) -> Any:
        """The command's options, as parsed."""
        return self.config[self.subcommand]


@contextlib.contextmanager
def _warnings_only() -> Iterator[None]:
    """Holds back what is told of a run's data and devices: it is in the report."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "alignment_modules", "datamodules")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check(rows: Natural) -> None:
    check_options(_check, locals())


def inspect_command(arguments: list[str]) -> int:
    """Runs `align inspect`.

    Args:
        arguments: What follows `inspect` on the command line.

    Returns:
        0; 1 where the run would be refused while it is under way, which is told on standard error.

    Raises:
        ValueError: Where it would be refused before, with the message of `align fit`.
    """
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(HELP)
        return 0
    try:
        cli: Any = run_cli(["fit", *arguments], cli=InspectCLI)
    except SystemExit as end:  # the parser has told why; 0: it was asked for something else
        return int(bool(end.code))
    with _warnings_only():
        found = inspect_run(cli.model, cli.datamodule, cli.trainer, cli.options.rows, cli.options.completion)
    show(found)
    if cli.options.html is not None:
        write_page(found, Path(cli.options.html).expanduser())
    for problem in found.problems:
        sys.stderr.write(f"align: error: {problem}\n")
    return int(bool(found.problems))
