"""What runs differ in, beside what came of them: TensorBoard's page HPARAMS."""

import inspect
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from alignment_modules.callbacks.steady_logging import try_write
from alignment_modules.functional.ranges import check_options

_METRICS = (
    *("test/exact_match", "val/exact_match", "val/loss", "val/reward", "val/rewards/accuracies"),
    *("train/loss", "train/reward"),
)
_SAME = ("policy", "evaluation", "override_lr")  # what is no option of the method, but for the policy's path

Plain = bool | int | float | str


class CompareRuns(Callback):
    """Writes the options that differ from their defaults where TensorBoard compares runs: its page HPARAMS.

    Works with any LightningModule that saves its hyperparameters. Losses, rewards and exact match, as they were last
    logged, stand beside the options.

    Args:
        enabled: False writes nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        check_options(CompareRuns.__init__, locals())
        self.enabled = enabled

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the options of a run that trains."""
        self._write(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes those of a test."""
        self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not (self.enabled and trainer.is_global_zero):
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                try_write(logger, partial(_write_options, logger, options_of(trainer, module)))


def _write_options(logger: TensorBoardLogger, options: Mapping[str, Plain]) -> None:
    for summary in hparams(options, dict.fromkeys(_METRICS, 0.0)):
        logger.experiment.file_writer.add_summary(summary)


def options_of(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Plain]:
    """A run's paradigm, policy, learning rate and batch, and its other options that are not as by default.

    Args:
        trainer: Of the run.
        module: What is trained or tested.
    """
    given = dict(module.hparams)
    policy = given.get("policy")
    path = policy.get("path") if isinstance(policy, Mapping) else policy
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    shown: dict[str, Any] = {
        "module": type(module).__name__,
        "policy": path if isinstance(path, str) else type(getattr(module, "policy", module)).__name__,
        "rows of a step": size and size * trainer.accumulate_grad_batches * trainer.world_size,
    }
    defaults = {
        name: parameter.default
        for level in reversed(type(module).__mro__)
        for name, parameter in inspect.signature(level.__init__).parameters.items()  # type: ignore[misc]
    }
    changed = {name: value for name, value in given.items() if name not in _SAME and value != defaults.get(name)}
    return {name: value for name, value in (shown | flat(changed)).items() if value is not None}


def _defaults(class_path: str) -> dict[str, Any]:
    """Default values of a class's options; none where it is not imported, as all that a configuration names is."""
    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    parameters = inspect.signature(found).parameters if callable(found) else {}
    return {option: parameter.default for option, parameter in parameters.items()}


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Plain]:
    """Nested options as one level of plain values: classes by their names, nothing that is None or private.

    Of an optimizer the rate and the weight decay are shown, of other classes what is not as by default.

    Example:
        >>> flat({"beta": 0.1, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5}}})
        {'beta': 0.1, 'optimizer': 'AdamW', 'optimizer.lr': 1e-05}
    """
    found: dict[str, Plain] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            inside: Mapping[str, Any] = value.get("init_args") or {} if "class_path" in value else value
            if "class_path" in value:
                found[prefix + name] = str(value["class_path"]).rpartition(".")[2]
            if "optimizer" in name:
                inside = {key: inside[key] for key in ("lr", "weight_decay") if key in inside}
            elif "class_path" in value:
                usual = _defaults(str(value["class_path"]))
                inside = {key: entry for key, entry in inside.items() if entry != usual.get(key, ...)}
            found |= flat(inside, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
            found[prefix + name] = ", ".join(value)
        elif isinstance(value, bool | int | float | str) and not name.startswith("_"):
            found[prefix + name] = value
    return found
