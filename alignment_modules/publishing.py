"""Where a module's numbers go: to the progress bar, to callbacks and to loggers, over the optimizer steps."""

from collections.abc import Collection, Mapping
from typing import Literal

import lightning as L
import torch


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Whether the Trainer logs this optimizer step: the first, and every `log_every_n_steps`-th."""
    interval = trainer.log_every_n_steps or 0  # type: ignore[attr-defined]
    return interval > 0 and (step == 1 or step % interval == 0)


def publish(
    module: L.LightningModule,
    values: Mapping[str, float],
    stage: Literal["train", "val", "test"],
    step: int,
    bar: Collection[str],
) -> None:
    """Sends numbers to progress bar, callbacks and loggers; the horizontal axis is the optimizer step.

    Callbacks have the loss of each training step already (`on_before_optimizer_step`), so that the bar alone gets the
    mean of several.

    Args:
        module: Whose numbers they are.
        values: Plain numbers by name, without the stage.
        stage: What the names begin with.
        step: The optimizer step.
        bar: The names that the progress bar shows.
    """
    trainer = module.trainer
    named = {f"{stage}/{name}": value for name, value in values.items()}
    shown = {f"{stage}/{name}" for name in bar}
    outside_fit = stage == "test" or (not trainer.training and trainer.state.fn == "validate")
    if stage == "train":  # all that `self.log` does with a plain number, in a fraction of its time
        trainer.progress_bar_metrics.update({name: value for name, value in named.items() if name in shown})
        for_callbacks = {name: torch.tensor(value) for name, value in named.items() if name != "train/loss"}
        trainer.callback_metrics.update(for_callbacks)
    else:
        for name, value in named.items():
            module.log(name, value, prog_bar=name in shown, logger=outside_fit, batch_size=1, add_dataloader_idx=False)
    if not outside_fit and not trainer.sanity_checking:
        for logger in module.loggers:
            logger.log_metrics(named, step=step)
