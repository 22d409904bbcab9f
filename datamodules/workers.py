"""What a worker process of a data loader does first."""

import contextlib
import os
import signal
import threading

from lightning.fabric.utilities.seed import pl_worker_init_function

_GROUP = ("SIGTERM", "SIGHUP", "SIGINT")  # what a scheduler or a terminal sends to a whole group of processes


def start_worker(worker_id: int) -> None:
    """Leaves signals to the process that trains, and seeds as Lightning does.

    A scheduler or a terminal signals the whole group. A worker that ended at once would take the batch, and with it the
    checkpoint, away from the training process; a worker whose parent is gone ends by itself, and one whose parent tells
    it to end, as a program that ends does, too.

    Args:
        worker_id: Number of the worker within its loader.
    """
    for name in _GROUP:
        if hasattr(signal, name):
            with contextlib.suppress(ValueError):  # not in a main thread
                signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # where it can be told who sent it
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, lambda *_: None)  # one that is ignored need not wait to be told of
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    if int(os.environ.get("PL_SEED_WORKERS", 0)):
        pl_worker_init_function(worker_id)


def _obey(parent: int) -> None:
    """Ends the process once its parent asks it to."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
