"""What a module has logged, handed over once a logging step."""

from typing import Any

import lightning as L
from lightning.pytorch import Callback


class LoggedMetrics(Callback):
    """Base of callbacks that follow the run's metrics: `on_logged` gets them as plain numbers, on rank 0 alone.

    They are read from `trainer.callback_metrics` at the logging steps (`log_every_n_steps`), so the host waits for the
    device no more often than logging makes it.
    """

    _read_at: int = -1

    def on_logged(self, trainer: L.Trainer, step: int, metrics: dict[str, float]) -> None:
        """Takes the metrics of optimizer step `step`."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A resumed run's first metrics are those of its own first logging step."""
        self._read_at = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Reads what the batch before has logged, to the last of the hooks at its end."""
        self._read(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads what the epoch's last batch has logged."""
        self._read(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads what came last."""
        self._read(trainer, at_once=True)

    def _read(self, trainer: L.Trainer, at_once: bool = False) -> None:
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        new = interval and (
            step // interval > self._read_at // interval or (step > self._read_at and self._read_at <= 0)
        )
        if not trainer.is_global_zero or not (new or (at_once and step > self._read_at)):
            return
        self._read_at = step
        self.on_logged(trainer, step, {name: float(value) for name, value in trainer.callback_metrics.items()})
