"""Where training stands in a checkpoint.

Lightning 2.6 saves its loops as they stand in the middle of a hook, and reads some of these states as others when it
resumes: an epoch that `max_steps` or a signal cut short counts as done, one in which no batch was read yet as begun,
and loaders that were set up early (a schedule asked for the run's length) keep no position at all. So a checkpoint
holds one of two states only, both of which Lightning resumes exactly: before an epoch, or after a batch with which an
optimizer step ended. Everything that relies on the form of Lightning's loops is in this module.
"""

from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

Position = Literal["whole", "rewound"]


def settle(checkpoint: dict[str, Any], accumulate: int) -> Position:
    """Rewrites the loops' state to the end of the last optimizer step, or to the end of an epoch that is over.

    A step's gradients are in no checkpoint before it was taken. Its batches are read again where the loader's state
    counts `batches_seen`, and in the middle of a batch with any loader. Between the batches of a step another loader
    cannot be put back: the step is then taken with those that follow alone, exactly normalised, and a warning says so.

    Args:
        checkpoint: What Lightning is about to write; `loops` is changed.
        accumulate: Batches of an optimizer step.

    Returns:
        "whole" where nothing was under way, and "rewound" where the checkpoint stands for the end of the step before.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    total, current = batches["total"], batches["current"]
    done, closed = current["processed"], epochs["current"]["processed"]
    in_flight = done < current["ready"]
    last = batches["is_last_batch"] and not in_flight
    opened = epochs["current"]["ready"] == epochs["current"]["started"]  # else its first hooks are running
    ended = opened and epochs["current"]["processed"] == epochs["current"]["started"]
    if not opened or (ended and last):
        done = 0
    elif ended and done:  # cut short by max_steps, a time limit or a signal
        closed -= 1
    states = loops["state_dict"].get("combined_loader", [])
    counted = len(states) == 1 and "batches_seen" in states[0]
    over = 0 if last else done % accumulate
    back = over if counted or in_flight else 0
    validation = loops["epoch_loop.val_loop.batch_progress"]
    validated = _validated(validation, current)
    done, all_done = done - back, total["processed"] - back
    if not done:
        states = [{**states[0], "epoch": closed, "batches_seen": 0}] if counted else []
    elif counted:
        states = [{**states[0], "epoch": closed, "batches_seen": done}]
    loops["state_dict"]["combined_loader"] = states
    for progress, count, begun in (
        (epochs["total"], closed, bool(done)),
        (epochs["current"], closed, bool(done)),
        (total, all_done, False),
        (current, done, False),
    ):
        progress.update(ready=count + begun, started=count + begun, processed=count, completed=count)
    batches["is_last_batch"] = bool(last and done)
    # Half begun means: to be run if one is due after this batch; untouched means that it was run.
    pending = int(bool(done) and not back and not validated)
    for progress in (validation["total"], validation["current"]):
        progress.update(ready=pending, started=pending, processed=0, completed=0)
    if over and not back:
        rank_zero_warn(
            f"this checkpoint falls within an optimizer step, after {over} of its {accumulate} batches, and the "
            "training loader is not one of this library's, which could read them again: a run that resumes from it "
            "leaves these out. Save every_n_train_steps, or load with datamodules.loader.ResumableLoader"
        )
    return "rewound" if over or in_flight else "whole"


def _validated(validation: dict[str, Any], batch: dict[str, int]) -> bool:
    """Whether a validation that was due after the last batch is over."""
    if batch["completed"] < batch["processed"]:
        return False  # the batch's own hooks are still running
    if batch["ready"] > batch["processed"]:
        return True  # the next batch has begun
    now = validation["current"]
    return bool(validation["is_last_batch"] and now["ready"] and now["completed"] == now["ready"])


def take_up(trainer: L.Trainer) -> None:
    """Gives the loaders the position that Lightning dropped, and starts an epoch of which nothing was read afresh.

    Lightning loads a loader's position while it sets the data up. Whoever asks for the run's length before the loops
    are restored (`estimated_stepping_batches`, in `configure_optimizers`) makes it do so too early, and not again.

    Args:
        trainer: The Trainer, at `on_train_start`.
    """
    loop = trainer.fit_loop
    if not loop.restarting:
        return
    if loop._combined_loader_states_to_load:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)  # type: ignore[arg-type]  # an iterator of before has another position
    if not loop.epoch_loop.batch_progress.current.ready:
        loop.epoch_loop.restarting = False
