"""The control of `benchmarks/environments.py`: a tool whose answers tell nothing of what is sought."""

import random

from datamodules.tasks import HiddenNumber


class DecoyNumber(HiddenNumber):
    """Like `HiddenNumber`, but questions are answered for another number of the range, drawn by itself."""

    def reset(self, low: int, high: int, number: int, seed: int) -> None:
        """Hides another number.

        Args:
            low: Where its range starts.
            high: Where it ends, included.
            number: What is sought; it stays out of the answers.
            seed: Of the other number.
        """
        super().reset(low, high, random.Random(seed).randint(low, high))
