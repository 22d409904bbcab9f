"""`align fit | validate | test | predict --config ...`: LightningCLI with both packages in reach."""

import sys
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

import alignment_modules  # noqa: F401  (makes `--model DPOModule` known)
import datamodules  # noqa: F401  (makes `--data PreferenceDataModule` known)
from alignment_modules.base import AlignmentModule
from alignment_modules.callbacks import AtomicCheckpointIO, ExactResume, ExportPolicy, FiniteGuard, Throughput

DEFAULT_ROOT = "runs/default"


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
        parser.set_defaults({"trainer.default_root_dir": DEFAULT_ROOT})

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration as typed: Lightning would override it with the checkpoint's hyperparameters."""

    def before_instantiate_classes(self) -> None:
        """Fills in what follows from other options: the logger's folder, the tokenizer, the atomic checkpoint writer."""
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        trainer = config.trainer
        if trainer.get("logger") in (None, True):
            trainer.logger = _namespace(
                "lightning.pytorch.loggers.TensorBoardLogger", save_dir=trainer.default_root_dir, name="", version=""
            )
        if trainer.get("plugins") is None:
            trainer.plugins = []
        policy_path = _policy_path(config.get("model"))
        data = (config.get("data") or {}).get("init_args")
        if data is not None and data.get("tokenizer") is None and policy_path and _accepts_tokenizer(data):
            data.tokenizer = policy_path

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the checkpoint writer that never leaves a half-written file."""
        plugins = list(self._get(self.config_init, "trainer").get("plugins") or [])
        if not any(isinstance(plugin, AtomicCheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        return super().instantiate_trainer(**kwargs, plugins=plugins)


def main(args: ArgsType = None, run: bool = True) -> AlignCLI:
    """Entry point of `align`.

    Args:
        args: Command-line arguments; None: those of the process.
        run: Whether to run the subcommand; False only builds trainer, module and datamodule.

    Returns:
        The CLI object, with `trainer`, `model` and `datamodule`.
    """
    try:
        return AlignCLI(
            AlignmentModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"prog": "align"} if run else {},
            args=args,
            run=run,
        )
    except SIGTERMException:
        sys.exit(143)  # 128 + SIGTERM: a scheduler must not take a preempted run for a finished one
