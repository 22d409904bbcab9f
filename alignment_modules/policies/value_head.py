"""A value head: what return a state is worth, read off any forward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignment_modules.policies.reading import Reading


class ValueHead(nn.Module):
    """A linear map from states to values, held and computed in float32 whatever the policy's dtype.

    The value of a target is that of the state that predicts it: what is expected before its token is known. It starts
    at 0, so that the first advantages are those without a critic. There is no bias, as a sequence classifier has none:
    it can be exported as one.

    Args:
        hidden_size: Width of the policy's states.

    Example:
        >>> ValueHead(4).weight
        Parameter containing:
        tensor([0., 0., 0., 0.], requires_grad=True)
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))

    def forward(self, reading: Reading) -> Tensor:
        """Values `[rows, time]` float32 of the targets, 0 elsewhere; differentiable in head and policy.

        Raises:
            ValueError: If the reading holds the policy's outputs in the place of hidden states.
        """
        return reading.place(self._values(reading, reading.targets))

    def last(self, reading: Reading) -> Tensor:
        """Values `[rows]` float32 of the rows' last states (a bootstrap), 0 for a row without tokens.

        Raises:
            ValueError: As `forward`, or if the last states were not asked for.
        """
        return self._values(reading, reading.last) * reading.segments.has_last()

    def _values(self, reading: Reading, states: Tensor) -> Tensor:
        if reading.head is None:
            raise ValueError(
                "a ValueHead reads hidden states, and this policy's cannot be told from its outputs: it needs a model "
                "of transformers with a linear head"
            )
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), self.weight[None]).squeeze(-1)
