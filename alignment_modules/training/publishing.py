"""Where a module's numbers go: to the progress bar, to callbacks and to loggers, over the optimizer steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

import lightning as L
import torch

from alignment_modules.functional.sources import PRESENT
from alignment_modules.functional.statistics import Statistic
from alignment_modules.training.meters import Meters
from alignment_modules.training.sources import gather_names
from alignment_modules.training.steps import NO_TARGETS

if TYPE_CHECKING:
    from alignment_modules.training.module import AlignmentModule


Stage = Literal["train", "val", "test"]
_TOGETHER = -1  # the number of all loaders whose rows have sources: these tell them apart


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Whether the Trainer logs this optimizer step: the first, and every `log_every_n_steps`-th."""
    interval = trainer.log_every_n_steps or 0  # type: ignore[attr-defined]
    return interval > 0 and (step == 1 or step % interval == 0)


def publish(
    module: L.LightningModule,
    values: Mapping[str, float],
    stage: Stage,
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


def publish_training(module: AlignmentModule, step: int) -> None:
    """Publishes the training means since this was last done, over all ranks, and begins new ones."""
    values = module._train_meters.compute(module.reduce, partial(gather_names, module))
    values["num_tokens"] = float(module.window.num_tokens)
    values["steps_without_targets"] = float(module.window.skipped)
    module._train_meters.reset()
    module.publish(values, "train", step)


def hold(module: AlignmentModule, statistics: Mapping[str, Statistic], loader: int) -> None:
    """Adds statistics to the means of a validation or test loader; loaders whose rows have sources are one.

    Args:
        module: Whose means.
        statistics: Of a batch.
        loader: Its number.
    """
    module._eval_meters.setdefault(_TOGETHER if PRESENT in statistics else loader, Meters()).update(statistics)


def publish_evaluation(module: AlignmentModule, stage: Literal["val", "test"]) -> None:
    """Publishes the means of each validation or test loader, over all ranks; what several have gets their numbers."""
    gather, held = partial(gather_names, module), sorted(module._eval_meters.items())
    means = {number: meters.compute(module.reduce, gather) for number, meters in held}
    found = Counter(name for values in means.values() for name in values)
    for number, values in means.items():
        suffixes = {name: f"/dataloader_idx_{number}" if found[name] > 1 else "" for name in values}
        module.publish({f"{name}{suffixes[name]}": value for name, value in values.items()}, stage)
    module._eval_meters.clear()


def end_epoch(module: AlignmentModule) -> None:
    """Publishes the steps of an epoch that no interval has logged.

    Raises:
        ValueError: If no step of the epoch had a target. One that was cut short is judged only where no step of the
            whole run had any.
    """
    step, window = module.global_step, module.window
    over = module.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    if window.learnt is False and (over or window.skipped == step):
        raise ValueError(
            f"nothing to learn in epoch {module.current_epoch}: not one of its optimizer steps had a target "
            f"({NO_TARGETS}). Look at the data's masks and lengths"
        )
    unlogged = module._train_meters.copy()
    if module._train_meters and module.trainer.log_every_n_steps:  # type: ignore[attr-defined]
        publish_training(module, step)
    if not over:
        module._train_meters = unlogged  # a run that goes on logs them at its own next step
    module._keep_totals(step)
