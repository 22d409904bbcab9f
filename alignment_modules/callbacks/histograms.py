"""How rewards, advantages, lengths and ratios of a rollout are spread, where a mean says little."""

from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from alignment_modules.callbacks.steady_logging import try_write
from alignment_modules.functional.ranges import check_options


class Histograms(Callback):
    """Sends histograms of the last rollout to TensorBoard at the logging steps.

    `histograms/reward`, `histograms/advantage` and `histograms/length` are over completions, without those that are not
    judged; `histograms/importance_ratio` is over the tokens of the logged steps: the policy over the one that the ratio
    compares with, 1 in a rollout's first step. They are those of rank 0, and with `dynamic_sampling` those of the last
    batch drawn. Loggers without histograms get none.

    Args:
        enabled: False sends nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        check_options(Histograms.__init__, locals())
        self.enabled = enabled
        self._logged = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a module that has no rollouts.

        Raises:
            TypeError: If the module has no `rollout`.
        """
        if stage == "fit" and self.enabled and not hasattr(pl_module, "rollout"):
            raise TypeError(f"Histograms needs {type(pl_module).__name__}.rollout; it has none")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Asks for the ratios where someone will see them."""
        self._logged = trainer.global_step
        if self.enabled and _loggers(trainer):
            pl_module.kept_ratios = []  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sends the histograms where one of the batch's steps was logged."""
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = interval and (step // interval > self._logged // interval or (step and not self._logged))
        if not (self.enabled and due):
            return
        self._logged = step
        if not trainer.is_global_zero:
            return
        finite = {name: values[values.isfinite()] for name, values in _values(pl_module).items()}
        for logger in _loggers(trainer):
            try_write(logger, partial(_send, logger, finite, step))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forgets the ratios of the batch before."""
        if getattr(pl_module, "kept_ratios", None):
            pl_module.kept_ratios.clear()  # type: ignore[union-attr, operator]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Asks for the ratios no more."""
        if self.enabled:
            pl_module.kept_ratios = None  # type: ignore[assignment]


def _loggers(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """The loggers that know histograms, on rank 0."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]


def _send(logger: TensorBoardLogger, histograms: dict[str, Tensor], step: int) -> None:
    for name, values in histograms.items():
        if len(values):
            logger.experiment.add_histogram(f"histograms/{name}", values, global_step=step)


def _values(module: Any) -> dict[str, Tensor]:
    """The numbers of each histogram, in one dimension."""
    rollout, ratios = module.rollout, getattr(module, "kept_ratios", None)
    found: dict[str, Tensor] = {}
    if rollout is not None:
        found = {"reward": rollout.rewards, "length": rollout.own.sum(dim=1).float()}
        if rollout.advantages is not None:
            mask = ~rollout.rewards.isnan() if rollout.advantages.dim() == 1 else rollout.own
            found["advantage"] = rollout.advantages[mask.to(rollout.advantages.device)]
    if ratios:
        found["importance_ratio"] = torch.cat(ratios)
    return found
