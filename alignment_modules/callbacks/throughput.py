"""How fast training goes: tokens and samples a second, and the share of padding."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from torch import Tensor

from alignment_modules.functional.ranges import check_options
from alignment_modules.training.checkpoint import per_rank

_KEY = "throughput"


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
        self._step = 0
        self._settled: tuple[list[Any], float] = ([0, 0, 0], 0.0)  # counts and seconds at the last optimizer step
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a module that cannot count.

        Raises:
            TypeError: If the module has no `count_tokens` method.
        """
        if stage == "fit" and not callable(getattr(pl_module, "count_tokens", None)):
            raise TypeError(f"Throughput needs {type(pl_module).__name__}.count_tokens(batch); it has none")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock, or lets it go on from where a checkpoint was written."""
        restored, self._restored = self._restored or {}, None
        counts = restored.get("counts")
        self._counts = [0, 0, 0]
        if counts is not None and len(counts) == trainer.world_size:
            self._counts = list(counts[trainer.global_rank])
        seconds = restored.get("seconds", 0.0)
        self._start = time.perf_counter() - seconds
        self._settled = (list(self._counts), seconds)
        self._last_logged = self._step = trainer.global_step

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds what was counted since the last logged step, up to the last optimizer step."""
        counts = [float(torch.as_tensor(count).sum()) for count in self._settled[0]]
        checkpoint[_KEY] = {"counts": per_rank(trainer, counts), "seconds": self._settled[1]}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Receives what `on_save_checkpoint` added."""
        self._restored = checkpoint.get(_KEY)

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
        if interval and step // interval > self._last_logged // interval:
            self._publish(trainer, pl_module)
        if step != self._step or not pl_module.automatic_optimization:
            self._settled = (list(self._counts), time.perf_counter() - self._start)
        self._step = step

    def _publish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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
        self._start, self._last_logged = now, trainer.global_step
        for name, value in values.items():
            shown = self.prog_bar and name == "train/tokens_per_second"
            pl_module.log(name, value, logger=False, prog_bar=shown, batch_size=1)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
