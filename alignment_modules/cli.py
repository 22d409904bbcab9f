"""`align fit | validate | test | predict --config ...`: LightningCLI with both packages in reach."""

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import alignment_modules  # makes `--model DPOModule` known
import datamodules  # makes `--data PreferenceDataModule` known
from alignment_modules.base import AlignmentModule
from alignment_modules.callbacks import (
    AtomicCheckpointIO,
    CompletionWriter,
    ExactResume,
    ExportPolicy,
    FiniteGuard,
    Throughput,
)
from alignment_modules.cli_errors import AlignArgumentParser, find_cause
from alignment_modules.cli_failures import is_message
from datamodules.sources import check_sources

DEFAULT_ROOT = "runs/default"


class FitConfigCallback(SaveConfigCallback):
    """Saves the resolved configuration of a `fit` beside its results; other subcommands leave it alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves at the start of `fit` only."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class AlignCLI(LightningCLI):
    """LightningCLI for alignment modules.

    Beside Lightning's own: every run writes below `trainer.default_root_dir` only (config, TensorBoard events,
    checkpoints, `export/`); the tokenizer is given once; what the user types is never overridden by a checkpoint.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks that every run has, each configurable under its own name."""
        parser.add_lightning_class_args(ExactResume, "exact_resume")
        parser.add_lightning_class_args(FiniteGuard, "finite_guard")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(ExportPolicy, "export")
        parser.add_lightning_class_args(CompletionWriter, "predictions")
        parser.set_defaults({"trainer.default_root_dir": DEFAULT_ROOT})

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration as typed: Lightning would override it with the checkpoint's hyperparameters."""

    def before_instantiate_classes(self) -> None:
        """Fills in what follows from other options: the logger's folder and the tokenizer."""
        self._as_given = self.config.clone()
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        trainer = config.trainer
        _check_exists(config.get("ckpt_path"))
        if config.get("ckpt_path") == "last":
            config.ckpt_path = _newest_checkpoint(Path(trainer.default_root_dir) / "checkpoints")
            self._as_given[self.subcommand].ckpt_path = config.ckpt_path  # the newest is another one after this run
        if trainer.get("logger") in (None, True):
            folder = Namespace(save_dir=trainer.default_root_dir, name="", version="", default_hp_metric=False)
            trainer.logger = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=folder)
        data = (config.get("data") or {}).get("init_args") or {}
        split = {"validate": "validation"}.get(self.subcommand, self.subcommand)
        if split != "fit" and split in data and data[split] is None and _is_ours(config.data):
            raise ValueError(f"data.{split}=None: `align {self.subcommand}` needs rows; give --data.{split} a source")
        if data and _is_ours(config.data):
            check_sources(data, ("train", "validation") if split == "fit" else (split,))
        if "tokenizer" in data and data["tokenizer"] is None:
            data["tokenizer"] = _policy_path(config.model.init_args.policy)

    def instantiate_classes(self) -> None:
        """Builds module, datamodule and Trainer; an error of theirs comes as they raised it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise (find_cause(error, is_message) or error) from None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the checkpoint writer that never leaves a half-written file.

        What `before_instantiate_classes` filled in has served; it must not be saved, or a run from the saved file would
        write into this one's folder even where it is given another.
        """
        self.config = self._as_given
        plugins = list(self._get(self.config_init, "trainer").get("plugins") or [])
        if not any(isinstance(plugin, AtomicCheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        return super().instantiate_trainer(**kwargs, plugins=plugins)


def _newest_checkpoint(folder: Path) -> str:
    """What `--ckpt_path last` means: Lightning would start from scratch where no file is called `last.ckpt`."""
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"ckpt_path='last': {folder} holds no checkpoint (*.ckpt) to resume from")
    return str(found[-1])


def _is_ours(data: Namespace) -> bool:
    """Whether a data module takes its rows from a source per split, and from nowhere else."""
    module, _, name = data.class_path.rpartition(".")
    hooks = ("val_dataloader", "test_dataloader", "predict_dataloader")
    found, base = getattr(importlib.import_module(module), name), datamodules.AlignmentDataModule
    return issubclass(found, base) and all(getattr(found, hook) is getattr(base, hook) for hook in hooks)


def _policy_path(policy: Any) -> str | None:
    """Where the policy's weights, and so its tokenizer, come from; None for a fresh model."""
    return policy if isinstance(policy, str) else policy.get("path") if isinstance(policy, Namespace) else None


def run_cli(args: ArgsType = None, run: bool = True) -> AlignCLI:
    """Parses the arguments, builds trainer, module and datamodule, and runs the subcommand.

    Args:
        args: Command-line arguments; None: those of the process.
        run: Whether there is a subcommand to run; False only builds.

    Returns:
        The CLI object, with `trainer`, `model` and `datamodule`.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # a file with the user's own rewards lies beside the configuration
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
    warnings.filterwarnings("ignore", message=".*It is recommended to use .*sync_dist")  # values come reduced already
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    _show_messages()
    return AlignCLI(
        AlignmentModule,
        LightningDataModule,
        parser_class=AlignArgumentParser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=FitConfigCallback,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_kwargs={"prog": "align"} if run else {},
        args=args,
        run=run,
    )


def _show_messages() -> None:
    """Prints what both packages have to say, such as the format of the data, where the program has no logging yet."""
    for package in (alignment_modules, datamodules):
        logger = logging.getLogger(package.__name__)
        if logger.hasHandlers():
            continue
        handler = logging.StreamHandler()
        handler.addFilter(lambda record: record.levelno > logging.INFO or getattr(rank_zero_only, "rank", 0) == 0)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def main(args: ArgsType = None) -> None:
    """Entry point of `align`; exits with 143 when the run was stopped by SIGTERM, with 1 when an input was refused.

    What is raised on purpose, by this library or while the run is set up (`cli_failures`), is printed without the calls
    that led there, unless `ALIGN_TRACEBACK` is set.
    """
    try:
        run_cli(args)
    except SIGTERMException:
        sys.exit(143)  # 128 + SIGTERM: a scheduler must not take a preempted run for a finished one
    except Exception as error:
        if os.environ.get("ALIGN_TRACEBACK") or not is_message(error):
            raise
        sys.stderr.write(f"align: error: {error}\n  (set ALIGN_TRACEBACK=1 to see where it was raised)\n")
        sys.exit(1)


def _check_exists(checkpoint: str | None) -> None:
    """Finds a mistyped path before anything is loaded; "last", "best" and remote paths are Lightning's business."""
    is_file = checkpoint is not None and ("/" in checkpoint or checkpoint.endswith(".ckpt"))
    if checkpoint is None or not is_file or "://" in checkpoint:
        return
    path = Path(checkpoint)
    if not path.exists():
        folder = path.parent.absolute()
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        found = f"{folder} holds {there[:10]}" if folder.is_dir() else f"there is no folder {folder} either"
        raise ValueError(f"ckpt_path={checkpoint!r}: there is no such file; {found}")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "For seamless cloud" not in record.getMessage()
