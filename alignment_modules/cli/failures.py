"""Which failures of a run are told in one message, and which keep their traceback.

A message says all there is to say where an error was raised on purpose. Errors of this library's own types and those
of Lightning about how it is used always are. Between batches (while the run is set up, data is read, or a checkpoint is
written) so are the families that libraries raise on purpose: only an option or a file can be wrong then. Within a batch
they may be anything, as is every other error anywhere: the traceback is the better answer.
"""

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from alignment_modules.callbacks import CheckpointError
from alignment_modules.rewards import RewardError
from alignment_modules.rollouts.engines import EngineError
from alignment_modules.rollouts.sampler import NonFiniteLogits

_TOLD = (CheckpointError, EngineError, FloatingPointError, MisconfigurationException, NonFiniteLogits, RewardError)
_ON_PURPOSE = (ValueError, OSError, ImportError, RuntimeError)


def is_message(error: BaseException, trainer: Trainer | None = None) -> bool:
    """Whether an error's message says all there is to say, by the rule at the top of this file.

    Args:
        error: What ended the program.
        trainer: The run's Trainer; None: it was not there yet.
    """
    return isinstance(error, _TOLD) or (isinstance(error, _ON_PURPOSE) and not _within_batch(trainer))


def _within_batch(trainer: Trainer | None) -> bool:
    """Whether the Trainer has begun a batch that it has not completed."""
    if trainer is None:
        return False
    fit = trainer.fit_loop.epoch_loop
    loops = (fit, fit.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    return any(loop.batch_progress.current.ready > loop.batch_progress.current.completed for loop in loops)
