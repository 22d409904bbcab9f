"""What a run leaves when it is stopped or fails: a checkpoint, and a line that says where it is."""

import contextlib
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from alignment_modules.callbacks.bar import end_bar
from alignment_modules.callbacks.checkpoints import Checkpoints
from alignment_modules.functional.ranges import check_options

_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)
]  # Windows has no SIGHUP
_ECHO_SECONDS = 2.0  # a scheduler may signal a process and its group, so that one signal comes twice
_PATIENCE = timedelta(minutes=5)  # how long a failed process waits for the checkpoint that another one writes


class StopAndSave(Callback):
    """Ends a fit in good order after SIGTERM, SIGHUP or the first Ctrl-C, and saves then and after any exception.

    A signal is only noted. All processes agree on it at the end of an optimizer step, or of a batch where there is one
    process; the batch is finished, a checkpoint written, and the exit status is 128 + the signal's number. A second
    signal ends the process at once. Signals that the program was started to ignore (`nohup`) stay ignored.

    An exception inside a batch leaves the weights of the last completed optimizer step, to which the modules of this
    library put every checkpoint back: the batches read since then count as not read. It goes to the folder of the
    Trainer's first `ModelCheckpoint` that saves whole checkpoints; without one nothing is saved. With several processes
    and sharded weights nothing is saved after an exception, since one process alone cannot.

    Args:
        resume: How to resume, for the message.
    """

    def __init__(self, resume: str = "with `ckpt_path` set to it") -> None:
        check_options(StopAndSave.__init__, locals())
        self.resume = resume
        self._signal: int | None = None
        self._since = 0.0
        self._stopping = False
        self._progress = self._first_progress = 0
        self._first_step: int | None = None
        self._fitting = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the place of Lightning's handler of SIGTERM, whose own broadcast meets that of a gradient."""
        self._signal, self._stopping, self._first_step = None, False, None
        self._fitting = stage == "fit"
        trainer._signal_connector._sigterm_notifier_fn = self._note  # type: ignore[method-assign, assignment]

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens to the other signals."""
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens to the other signals, and notes where the fit begins."""
        self._listen()
        self._first_step = trainer.global_step
        self._progress = self._first_progress = _progress(trainer)

    def _listen(self) -> None:
        for number in _SIGNALS:
            with contextlib.suppress(ValueError):  # not in the main thread
                if number != signal.SIGTERM and signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._note)  # Lightning puts the former handlers back at its teardown

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._signal is not None:
            if number != signal.SIGINT and time.monotonic() - self._since < _ECHO_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signal, self._since = number, time.monotonic()
        if not self._fitting:
            raise SIGTERMException(128 + number)
        with contextlib.suppress(OSError):  # not through sys.stderr, which this may have interrupted
            os.write(
                2, f"\nalign: {name}: stops at the end of this batch and saves; once more ends it at once\n".encode()
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agrees on a signal; Lightning then ends the fit when this batch is done with."""
        before, self._progress = self._progress, _progress(trainer)
        stepped = self._progress != before
        if stepped or trainer.world_size == 1:
            self._agree(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins no validation once the fit is to stop."""
        self._raise_if_stopping()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Breaks a validation off where there is one process; several may have different numbers of batches."""
        if self._fitting and trainer.world_size == 1:
            self._agree(trainer)
            self._raise_if_stopping()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops after a validation in which a signal came."""
        if self._fitting:
            self._agree(trainer)
            self._raise_if_stopping()

    def _agree(self, trainer: L.Trainer) -> None:
        number = self._signal or 0
        if trainer.world_size > 1:
            mine = torch.tensor(float(number), device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(mine, reduce_op="max"))
        if number and not self._stopping:
            self._signal, self._stopping = number, True
            trainer._signal_connector.received_sigterm = True

    def _raise_if_stopping(self) -> None:
        if self._stopping:
            raise SIGTERMException(128 + (self._signal or signal.SIGTERM))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves, and says where; gives a stopped program its exit status."""
        number = self._signal or signal.SIGTERM
        stopped = isinstance(exception, SIGTERMException)
        if isinstance(exception, SIGTERMException):
            exception.code = 0 if _is_child(trainer) else 128 + number
        if trainer.state.fn != TrainerFn.FITTING or self._first_step is None:
            return
        try:
            path = self._save(trainer, alone=not stopped)
            message = None if path is None else f"checkpoint {path}\n  resume {self.resume}"
        except Exception as error:  # what ended the run matters more
            message = f"could not save a checkpoint: {error}"
        if message and (trainer.is_global_zero or not stopped):
            why = f"stopped by {signal.Signals(number).name}" if stopped else f"ended by {type(exception).__name__}"
            end_bar(trainer)
            sys.stderr.write(f"align: {why} after optimizer step {trainer.global_step}; {message}\n")

    def _save(self, trainer: L.Trainer, *, alone: bool) -> str | None:
        """Writes a checkpoint of the last completed step, if there is none; returns its path where there is one.

        `alone`: the other processes may be in the middle of anything.
        """
        savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        whole = [saver for saver in savers if not saver.save_weights_only]
        step = trainer.global_step
        if not whole or trainer.fast_dev_run or trainer.sanity_checking:  # type: ignore[attr-defined]
            return None
        for saver in whole:  # what a saver wrote last, and at which step, it says in private attributes only
            if saver._last_checkpoint_saved and saver._last_global_step_saved == step:
                return str(saver._last_checkpoint_saved)
        # Steps that count as none of the run are whole at the end of a batch only, where a signal is heard.
        if step == self._first_step and (alone or _progress(trainer) == self._first_progress):
            return None
        saver = whole[0]
        if isinstance(saver, Checkpoints):
            path = saver.next_path(trainer)
        else:
            path = str(Path(saver.dirpath or ".") / f"stopped-epoch={trainer.current_epoch}-step={step}.ckpt")
        if alone and trainer.world_size > 1:
            if not isinstance(trainer.strategy, DDPStrategy) or not _save_without_the_others(trainer, path):
                return None
        else:
            trainer.save_checkpoint(path)
        if isinstance(saver, Checkpoints):
            saver.note_saved(trainer)
        for saver in savers:
            saver._last_global_step_saved = step  # none of them saves this step once more
        return path


def _progress(trainer: L.Trainer) -> int:
    """Optimizer steps taken so far, those of a critic before the policy's first included."""
    return getattr(trainer.lightning_module, "rollout_step", trainer.global_step)


def _save_without_the_others(trainer: L.Trainer, path: str) -> bool:
    """Saves from this process alone, or waits for the one that does; returns whether it was this one.

    Weights, optimizer and counters are the same in all processes, of which any number may have failed; those that have
    not wait in a sum for those that have, so that no collective can be used. A process that ended would have the
    launcher kill the one that saves.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    key = f"stop_and_save/{trainer.global_step}"
    if store.add(key, 1) > 1:
        with contextlib.suppress(Exception):
            store.wait([f"{key}/done"], _PATIENCE)
        return False
    try:
        trainer.strategy.checkpoint_io.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(False), path)
    finally:
        store.set(f"{key}/done", "")
    return True


def _is_child(trainer: L.Trainer) -> bool:
    """Whether Lightning started this process; it would kill the others if one ended with another status than 0."""
    return trainer.local_rank > 0 and isinstance(
        trainer._accelerator_connector.cluster_environment, LightningEnvironment
    )
