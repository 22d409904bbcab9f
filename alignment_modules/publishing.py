"""Where a module's numbers go: to the progress bar, to callbacks and to loggers, over the optimizer steps."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch

from alignment_modules.objective import Meters
from alignment_modules.ranks import RankReductions


class Publishing(RankReductions):
    """Says which optimizer steps are logged, and sends what was measured."""

    bar: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics that the progress bar shows."""
    _eval_meters: dict[int, Meters]

    @property
    def logging_due(self) -> bool:
        """Whether the optimizer step now being built will be logged: costly statistics are computed only then."""
        return self._trainer is not None and self._is_logged(self.global_step + 1)

    def _is_logged(self, step: int) -> bool:
        interval = self.trainer.log_every_n_steps or 0  # type: ignore[attr-defined]
        return interval > 0 and (step == 1 or step % interval == 0)

    def publish(
        self, values: Mapping[str, float], stage: Literal["train", "val", "test"], step: int | None = None
    ) -> None:
        """Sends numbers to progress bar, callbacks and loggers; the horizontal axis is the optimizer step.

        Callbacks have the loss of each training step already (`on_before_optimizer_step`), so that the bar alone gets
        the mean of several.
        """
        named = {f"{stage}/{name}": value for name, value in values.items()}
        shown = {f"{stage}/{name}" for name in (*self.bar, "exact_match")}
        outside_fit = stage == "test" or (not self.trainer.training and self.trainer.state.fn == "validate")
        if stage == "train":  # all that `self.log` does with a plain number, in a fraction of its time
            self.trainer.progress_bar_metrics.update({name: value for name, value in named.items() if name in shown})
            for_callbacks = {name: torch.tensor(value) for name, value in named.items() if name != "train/loss"}
            self.trainer.callback_metrics.update(for_callbacks)
        else:
            for name, value in named.items():
                self.log(
                    name, value, prog_bar=name in shown, logger=outside_fit, batch_size=1, add_dataloader_idx=False
                )
        if not outside_fit and not self.trainer.sanity_checking:
            for logger in self.loggers:
                logger.log_metrics(named, step=self.global_step if step is None else step)

    def on_validation_epoch_end(self) -> None:
        """Publishes the validation means."""
        self._publish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Publishes the test means."""
        self._publish_evaluation("test")

    def _publish_evaluation(self, stage: Literal["val", "test"]) -> None:
        for number, meters in sorted(self._eval_meters.items()):
            suffix = f"/dataloader_idx_{number}" if len(self._eval_meters) > 1 else ""
            self.publish({f"{name}{suffix}": v for name, v in meters.compute(self.reduce).items()}, stage)
        self._eval_meters.clear()
