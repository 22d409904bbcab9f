"""How fast training goes: tokens and samples a second, and the share of padding."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from torch import Tensor

from alignment_modules.functional.ranges import check_options


class Throughput(Callback):
    """Logs `train/tokens_per_second`, `train/samples_per_second` and `train/padding_share` on logging steps.

    Counts come from the module's `count_tokens(batch) -> {"tokens", "samples", "padding"}` (integers or tensors, which
    stay on their device until they are logged) and are added over all ranks. Time is wall time since the last logged
    step, without validation. The horizontal axis is the optimizer step.

    Args:
        prog_bar: Whether the progress bar shows the tokens per second.
    """

    def __init__(self, prog_bar: bool = False) -> None:
        check_options(Throughput.__init__, locals())
        self.prog_bar = prog_bar
        self._counts: list[Any] = [0, 0, 0]
        self._start = 0.0
        self._paused_at = 0.0
        self._last_logged = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a module that cannot count.

        Raises:
            TypeError: If the module has no `count_tokens` method.
        """
        if stage == "fit" and not callable(getattr(pl_module, "count_tokens", None)):
            raise TypeError(f"Throughput needs {type(pl_module).__name__}.count_tokens(batch); it has none")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._counts = [0, 0, 0]
        self._start = time.perf_counter()
        self._last_logged = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets the clock run again."""
        self._start += time.perf_counter() - self._paused_at

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch, and logs on logging steps."""
        counts = pl_module.count_tokens(batch)  # type: ignore[operator]
        for row, name in enumerate(("tokens", "samples", "padding")):
            value = counts[name]
            # added on the device: reading a number back would make the host wait
            self._counts[row] = self._counts[row] + (value.detach() if isinstance(value, Tensor) else value)
        interval, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]
        if not interval or step // interval <= self._last_logged // interval:
            return
        totals = torch.stack([torch.as_tensor(count, device=pl_module.device).double().sum() for count in self._counts])
        if trainer.world_size > 1:
            totals = trainer.strategy.reduce(totals, reduce_op="sum")
        tokens, samples, padding = totals.tolist()
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        values = {
            "train/tokens_per_second": tokens / seconds,
            "train/samples_per_second": samples / seconds,
            "train/padding_share": padding / max(tokens + padding, 1.0),
        }
        self._counts = [0, 0, 0]
        self._start, self._last_logged = now, step
        for name, value in values.items():
            shown = self.prog_bar and name == "train/tokens_per_second"
            pl_module.log(name, value, logger=False, prog_bar=shown, batch_size=1)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
