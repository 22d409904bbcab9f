"""What a worker process of a data loader does first."""

import contextlib
import os
import signal

from lightning.fabric.utilities.seed import pl_worker_init_function


def start_worker(worker_id: int) -> None:
    """Leaves signals to the process that trains, and seeds as Lightning does.

    A scheduler or a terminal signals the whole group. A worker that ended at once would take the batch, and with it the
    checkpoint, away from the training process; a worker whose parent is gone ends by itself.

    Args:
        worker_id: Number of the worker within its loader.
    """
    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        if hasattr(signal, name):
            with contextlib.suppress(ValueError):  # not in a main thread
                signal.signal(getattr(signal, name), signal.SIG_IGN)
    if int(os.environ.get("PL_SEED_WORKERS", 0)):
        pl_worker_init_function(worker_id)
