"""Random numbers that depend on where training stands, not on how it got there."""

import os
import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch import Callback

from alignment_modules.functional.ranges import Seed, check_options


class ExactResume(Callback):
    """Seeds torch, Python and NumPy before each training batch from (seed, optimizer step, batch, rank).

    Dropout and every other draw in `training_step` are then the same in a resumed run as in one that was never
    interrupted, without any generator in the checkpoint, and differ from rank to rank. The data's order is the loader's
    business.

    Args:
        seed: The run's seed; None: the one of `seed_everything`, or 0.

    Raises:
        ValueError: If `seed` is negative.
    """

    def __init__(self, seed: Seed | None = None) -> None:
        check_options(ExactResume.__init__, locals())
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds all generators for this batch."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        sequence = np.random.SeedSequence([seed, trainer.global_step, batch_idx, trainer.global_rank])
        words = sequence.generate_state(4, dtype=np.uint32)
        torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        random.seed(int(words[2]))
        np.random.seed(words[3])
