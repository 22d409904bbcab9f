"""What Lightning's progress bar does to lines that are printed while it is on the screen."""

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


def end_bar(trainer: L.Trainer) -> None:
    """Ends a rich progress bar: while it lives it breaks long lines, so that a command in them cannot be copied.

    Args:
        trainer: The Trainer whose bar it is.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        bar.teardown(trainer, trainer.lightning_module, "fit")
