"""The command line's own checkpoints: the last state of a run, never long ago."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from alignment_modules.functional.ranges import Count, Positive, check_options


class Checkpoints(ModelCheckpoint):
    """Keeps the last checkpoint of a run: every so many minutes, and at the end of each epoch.

    Unlike Lightning's, its clock also runs under manual optimization, and it never saves between the micro-batches of
    an optimizer step. The new file is whole before the former one is removed; the one that the run was resumed from
    stays.

    Args:
        every_n_minutes: Minutes of training between two checkpoints; None: no clock.
        every_n_steps: Optimizer steps between two checkpoints; None: they are not counted. With several a batch, the
            first end of a batch at which so many are done.
        dirpath: The folder; None: `checkpoints` in the logger's folder, or in the Trainer's `default_root_dir`.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(
        self, every_n_minutes: Positive | None = 10.0, every_n_steps: Count | None = None, dirpath: str | None = None
    ) -> None:
        check_options(Checkpoints.__init__, locals())
        super().__init__(dirpath=dirpath, save_on_train_epoch_end=True, enable_version_counter=False)
        self.every_n_minutes = every_n_minutes
        self.every_n_steps = every_n_steps
        self._written: list[str] = []
        self._step = 0
        self._saved_at = (0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step
        self._saved_at = (self._step, time.monotonic())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where an optimizer step was completed and a checkpoint is due."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped and self._is_due(trainer) and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _is_due(self, trainer: L.Trainer) -> bool:
        step, moment = self._saved_at
        if self.every_n_steps is not None and self._step // self.every_n_steps > step // self.every_n_steps:
            return True
        if self.every_n_minutes is None:
            return False
        due = time.monotonic() - moment >= 60 * self.every_n_minutes
        # the processes' clocks differ, and all take part in a save
        return due if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(due, all=False)

    def next_path(self, trainer: L.Trainer) -> str:
        """Where a checkpoint taken now goes; notes it, so that the file itself says what to remove after a resume."""
        path = self.format_checkpoint_name(self._monitor_candidates(trainer))
        self.best_model_path = path
        self._written = [*(written for written in self._written if written != path), path]
        return path

    def note_saved(self, trainer: L.Trainer) -> None:
        """Removes the former checkpoints of this run, but not the one it was resumed from, once a new one is there."""
        *former, last = self._written
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, last
        self._saved_at = (trainer.global_step, time.monotonic())
        kept = [path for path in former if not self._should_remove_checkpoint(trainer, path, last)]
        for path in former:
            if path not in kept and self._fs.exists(path):
                self._remove_checkpoint(trainer, path)
        self._written = [*kept, last]

    def _save_none_monitor_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._save_checkpoint(trainer, self.next_path(trainer))
        self.note_saved(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's own state, and the files that are there."""
        return {**super().state_dict(), "written": list(self._written)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the former run's files where it wrote into the same folder."""
        if state_dict.get("dirpath") == self.dirpath:
            super().load_state_dict(state_dict)
            self._written = list(state_dict.get("written", ()))
