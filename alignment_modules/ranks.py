"""What the ranks of a run tell one another."""

from typing import Any

import lightning as L
import torch
from torch import Tensor


class RankReductions(L.LightningModule):
    """Reductions over all ranks; without a Trainer there is one."""

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """Combines a tensor over all ranks: "sum", "min" or "max"."""
        if self._trainer is None or self.trainer.world_size == 1:
            return values
        # A copy: the collective writes into what it is given.
        return self.trainer.strategy.reduce(values.to(self.device, copy=True), reduce_op=how)

    def all_gather_ragged(self, values: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order, whatever its length."""
        parts: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, values.cpu())
        return [part.to(self.device) for part in parts]
