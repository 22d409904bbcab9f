"""A running deviation: what rewards are divided by where their scale is not known before the run."""

from __future__ import annotations

import math
from collections.abc import Mapping


class RunningScale:
    """Deviation of all numbers seen so far, from their sums, merged without cancellation (Chan et al. 1979).

    Example:
        >>> scale = RunningScale()
        >>> scale.update(count=2, total=4.0, squares=10.0)  # 1 and 3
        >>> scale.update(count=1, total=5.0, squares=25.0)
        >>> scale.deviation
        2.0
    """

    def __init__(self) -> None:
        self.count, self.mean, self.spread = 0.0, 0.0, 0.0

    @property
    def deviation(self) -> float:
        """Sample deviation; 1 where fewer than two numbers were seen, or all of them are equal up to rounding."""
        if self.count < 2:
            return 1.0
        deviation = math.sqrt(max(self.spread, 0.0) / (self.count - 1))
        return deviation if deviation > 1e-6 else 1.0

    def update(self, *, count: float, total: float, squares: float) -> None:
        """Adds numbers.

        Args:
            count: How many.
            total: Their sum.
            squares: The sum of their squares.
        """
        if not count:
            return
        mean, whole = total / count, self.count + count
        shift = mean - self.mean
        self.spread += squares - total * mean + shift * shift * self.count * count / whole
        self.mean += shift * count / whole
        self.count = whole

    def state_dict(self) -> dict[str, float]:
        """Plain numbers, for a checkpoint."""
        return {"count": self.count, "mean": self.mean, "spread": self.spread}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Takes up what `state_dict` gave."""
        self.count, self.mean, self.spread = (float(state[name]) for name in ("count", "mean", "spread"))
