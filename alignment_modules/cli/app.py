"""`align fit | validate | test | predict --config ...`: LightningCLI with both packages in reach."""

import contextlib
import logging
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.optim import Optimizer

import alignment_modules  # makes `--model DPOModule` known
import datamodules  # makes `--data PreferenceDataModule` known
from alignment_modules.callbacks import (
    AtomicCheckpointIO,
    Checkpoints,
    CompareRuns,
    CompletionWriter,
    ExactResume,
    ExportPolicy,
    FiniteGuard,
    LearningWatch,
    RunReport,
    StepBar,
    StopAndSave,
    Throughput,
)
from alignment_modules.callbacks.steady_logging import keep_training
from alignment_modules.cli.commands import COMMANDS, run_command
from alignment_modules.cli.data_checks import check_data
from alignment_modules.cli.devices import check_devices
from alignment_modules.cli.errors import AlignArgumentParser, find_cause
from alignment_modules.cli.failures import is_message
from alignment_modules.cli.own_files import find_own_files
from alignment_modules.cli.policy_options import follow_policy, policy_path
from alignment_modules.cli.run_folder import earlier_run, locked, set_aside
from alignment_modules.cli.runs import checkpoint_folders, checkpoint_meant, follow_parent, is_of_run, resume_command
from alignment_modules.policies.export import stages_of
from alignment_modules.policies.weights import is_first_process, on_first_process
from alignment_modules.training.module import AlignmentModule
from alignment_modules.training.strategies import refuse_strategy, shards_weights

logger = logging.getLogger(__name__)

DEFAULT_ROOT = "runs/default"
_format_other_warning = warnings.formatwarning


class FitConfigCallback(SaveConfigCallback):
    """Saves the resolved configuration of a `fit` beside its results; other subcommands leave it alone."""

    earlier: Sequence[Path] = ()  # what another run left in the folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing: a fit that fails before its first step leaves what an earlier one wrote as it was."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Before the first step: sets an earlier run aside, and saves."""
        if self.already_saved:
            return
        if trainer.is_global_zero and self.earlier:
            folder = Path(trainer.default_root_dir)
            target = set_aside(folder, self.earlier)
            if target is not None:
                logger.warning(
                    "%s held an earlier run: moved to %s. (To go on with a run, add --ckpt_path last)", folder, target
                )
        super().setup(trainer, pl_module, "fit")
        for log in trainer.loggers:
            if trainer.is_global_zero and isinstance(log, TensorBoardLogger):
                Path(log.log_dir, log.NAME_HPARAMS_FILE).unlink(missing_ok=True)  # it would keep the first run's values
                log.save()


class AlignCLI(LightningCLI):
    """LightningCLI for alignment modules.

    Beside Lightning's own: every run writes below `trainer.default_root_dir` only (config, TensorBoard events,
    checkpoints, `export/`); the tokenizer is given once; what the user types is never overridden by a checkpoint.
    """

    running: Callable[[], Trainer | None] = staticmethod(lambda: None)  # Lightning runs a command in the constructor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args")
        self._arguments = list(map(str, given)) if isinstance(given, list | tuple) else sys.argv[1:]
        self._earlier: list[Path] = []
        with contextlib.ExitStack() as self._cleanup:
            super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks that every run has, each configurable under its own name."""
        parser.add_lightning_class_args(ExactResume, "exact_resume")
        parser.add_lightning_class_args(FiniteGuard, "finite_guard")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(ExportPolicy, "export")
        parser.add_lightning_class_args(CompletionWriter, "predictions")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(LearningWatch, "watch")
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_lightning_class_args(CompareRuns, "comparison")
        parser.set_defaults({"trainer.default_root_dir": DEFAULT_ROOT, "trainer.enable_model_summary": False})

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration as typed: Lightning would override it with the checkpoint's hyperparameters."""

    def before_instantiate_classes(self) -> None:
        """Fills in what follows from other options: the logger's folder and the tokenizer."""
        self._as_given = self.config.clone()
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        trainer = config.trainer
        refuse_strategy(getattr(trainer.strategy, "class_path", trainer.strategy))
        _check_exists(config.get("ckpt_path"))
        if config.get("ckpt_path") in ("last", "best"):
            config.ckpt_path = checkpoint_meant(config)
            self._as_given[self.subcommand].ckpt_path = config.ckpt_path  # the last is another one after this run
        if self.subcommand == "fit":
            self._claim_folder(config)
        if trainer.get("logger") in (None, True):
            policy = (config.model.get("init_args") or Namespace()).get("policy")
            stages = len(stages_of(policy_path(policy)))
            trainer.logger = Namespace(
                class_path="alignment_modules.callbacks.tensorboard.TensorBoard",
                init_args=Namespace(save_dir=trainer.default_root_dir, stages=stages),
            )
        data = (config.get("data") or {}).get("init_args") or {}
        check_data(config.get("data"), self.subcommand)
        for name, value in follow_policy(data, (config.model.get("init_args") or {}).get("policy")).items():
            data[name] = value

    def _claim_folder(self, config: Namespace) -> None:
        """Makes the run's folder its own; only the first process does."""
        root, checkpoint = config.trainer.default_root_dir, config.get("ckpt_path")
        if not is_first_process() or "://" in root or config.trainer.get("fast_dev_run"):
            return
        self._cleanup.enter_context(locked(Path(root)))
        if not is_of_run(checkpoint, [Path(root), *checkpoint_folders(config)]):
            self._earlier = earlier_run(Path(root))

    def instantiate_classes(self) -> None:
        """Builds module, datamodule and Trainer; an error of theirs comes as they raised it.

        Of weights that are going to be sharded each process but the first builds the shapes alone.
        """
        trainer = self._get(self.config, "trainer")
        check_devices(trainer.accelerator, trainer.devices)
        strategy = trainer.strategy
        shards = shards_weights(getattr(strategy, "class_path", strategy))
        try:
            with on_first_process() if shards else contextlib.nullcontext():
                super().instantiate_classes()
        except ValueError as error:
            raise find_cause(error) from None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the checkpoint writer that never leaves a half-written file.

        What `before_instantiate_classes` filled in has served; it must not be saved, or a run from the saved file would
        write into this one's folder even where it is given another.
        """
        self.config = self._as_given
        plugins = list(self._get(self.config_init, "trainer").get("plugins") or [])
        if not any(isinstance(plugin, AtomicCheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        trainer = super().instantiate_trainer(**kwargs, plugins=plugins)
        AlignCLI.running = weakref.ref(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FitConfigCallback):
                callback.earlier = self._earlier
        for log in trainer.loggers:
            keep_training(log)
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Adds what saves a run that ends early; the user's own `ModelCheckpoint` takes the place of `Checkpoints`."""
        given = config.get("callbacks") or []
        own = given if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is not False and not config.get("barebones"):
            callbacks = [*callbacks, *([] if any(isinstance(one, ProgressBar) for one in own) else [StepBar()])]
        has_own = any(isinstance(callback, ModelCheckpoint) for callback in own)
        if has_own or config.get("enable_checkpointing") is False or config.get("barebones"):
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoints)]
        return super()._instantiate_trainer(config, [*callbacks, StopAndSave(resume_command(self._arguments))])


def run_cli(args: ArgsType = None, run: bool = True, cli: type[AlignCLI] = AlignCLI) -> AlignCLI:
    """Parses the arguments, builds trainer, module and datamodule, and runs the subcommand.

    Args:
        args: Command-line arguments; None: those of the process.
        run: Whether there is a subcommand to run; False only builds.
        cli: What parses, builds and runs.

    Returns:
        The CLI object, with `trainer`, `model` and `datamodule`.
    """
    find_own_files()
    for name in ("torchao", "torch.utils._pytree"):  # what it could not load on a CPU, and what torch says of it
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*You defined a `validation_step` but have no")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
    warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule`")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")  # an epoch's last step is logged
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*It is recommended to use .*sync_dist")  # values come reduced already
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_is_no_advertisement)
    _hide_bars()
    warnings.formatwarning = _format_warning
    _show_messages()
    return cli(
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


def _hide_bars() -> None:
    """Keeps the bars of transformers out of a log file, where they are a line for each of their steps."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


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
    """Entry point of `align`; exits with 128 + its number after a signal, with 1 when an input was refused.

    What is raised on purpose (`cli.failures`) is printed without the calls that led there, unless `ALIGN_TRACEBACK` is
    set.
    """
    AlignCLI.running = lambda: None
    if os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=follow_parent, args=(os.getppid(),), daemon=True).start()
    given = sys.argv[1:] if args is None else args
    try:
        if isinstance(given, list | tuple) and given and str(given[0]) in COMMANDS:
            _hide_bars()
            if code := run_command(str(given[0]), [str(argument) for argument in given[1:]]):
                sys.exit(code)
            return
        run_cli(args)
    except SIGTERMException as stopped:
        sys.exit(143 if stopped.code is None else stopped.code)  # a preempted run is not a finished one
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("ALIGN_TRACEBACK") or not is_message(error, AlignCLI.running()):
            raise
        sys.stderr.write(f"align: error: {error}\n  (set ALIGN_TRACEBACK=1 to see where it was raised)\n")
        sys.exit(1)


def _check_exists(checkpoint: str | None) -> None:
    """Finds a mistyped path before anything is loaded; "last", "best" and remote paths are looked for later."""
    is_file = checkpoint is not None and ("/" in checkpoint or checkpoint.endswith(".ckpt"))
    if checkpoint is None or not is_file or "://" in checkpoint:
        return
    path = Path(checkpoint)
    if not path.exists():
        folder = path.parent.absolute()
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        found = f"{folder} holds {there[:10]}" if folder.is_dir() else f"there is no folder {folder} either"
        raise ValueError(f"ckpt_path={checkpoint!r}: there is no such file; {found}")


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this project in one line; others with the place that they come from."""
    ours = {Path(str(package.__file__)).parent for package in (alignment_modules, datamodules)}
    if ours & set(Path(filename).parents):
        return f"warning: {message}\n"
    return _format_other_warning(message, category, filename, lineno, line)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(
        ("\N{ELECTRIC LIGHT BULB}", "TPU available", "Loading `train_dataloader`", "`weights_only` was not set")
    )
