"""Loggers whose writes may fail without ending a run."""

import contextlib
import functools
import time
import weakref
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from alignment_modules.training.checkpoint_files import write_error

_AGAIN = 300.0  # seconds after which a logger that failed is tried again
_RESTS: weakref.WeakKeyDictionary[Logger, "_Rest"] = weakref.WeakKeyDictionary()


def keep_training(logger: Logger) -> None:
    """Makes a failed write of a logger a warning, which names its folder, and lets training go on.

    The logger then rests for five minutes, and opens its file anew: a disk may have space again.

    Args:
        logger: Any logger; its methods are replaced.
    """
    rest = _RESTS.setdefault(logger, _Rest(logger))
    for name in ("log_metrics", "log_hyperparams", "log_text", "save", "finalize", "after_save_checkpoint"):
        if callable(method := getattr(logger, name, None)):
            setattr(logger, name, rest.guard(method))


def try_write(logger: Logger, write: Callable[[], Any]) -> None:
    """Writes something with a logger's own writer; a failure is what `keep_training` makes of it.

    Args:
        logger: The logger.
        write: What writes.
    """
    _RESTS.setdefault(logger, _Rest(logger)).guard(write)()


class _Rest:
    def __init__(self, logger: Logger) -> None:
        self._logger = weakref.ref(logger)
        self.until = 0.0
        self.warned = False

    @property
    def logger(self) -> Any:
        return self._logger()

    def guard(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if time.monotonic() < self.until:
                return None
            try:
                return method(*args, **kwargs)
            except Exception as error:
                found = write_error(error)
                if found is None:
                    raise
                self.fail(found)
                return None

        return guarded

    def fail(self, error: OSError) -> None:
        self.until = time.monotonic() + _AGAIN
        folder = getattr(self.logger, "log_dir", None) or self.logger.save_dir
        if not self.warned:
            self.warned = True
            rank_zero_warn(
                f"{type(self.logger).__name__} cannot write to {str(folder)!r}: {error.strerror or error}. Training "
                "goes on without it; it is tried again every 5 minutes"
            )
        writer: Any = getattr(self.logger, "_experiment", None)
        if hasattr(writer, "add_scalar"):  # TensorBoard's thread has ended; only a new writer has another
            self.logger._experiment = None
            with contextlib.suppress(Exception):
                writer.close()
