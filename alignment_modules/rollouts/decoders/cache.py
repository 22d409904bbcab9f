"""A key/value cache for transformers' forward that never grows by concatenation.

This module imports transformers: import it inside functions only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class PreallocatedLayer(CacheLayerMixin):
    """One layer's keys and values `[rows, heads, capacity, head_dim]`, filled from the left.

    Args:
        capacity: Tokens that fit.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates for the shape, type and device of the first states."""
        self.keys, self.values = self._room(key_states, len(key_states)), self._room(value_states, len(value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes `[rows, heads, new, head_dim]` states behind the present ones and returns views of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row `i` what row `beam_idx[i]` was; copies only what is filled."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._room(old, len(beam_idx))
            torch.index_select(old[:, :, : self.length], 0, beam_idx, out=new[:, :, : self.length])
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of the keys that a forward of `query_length` tokens attends to."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length + int(new), 0

    def get_seq_length(self, *args: Any) -> int:
        """Tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """No limit that a mask would need to know."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` before transformers 5.24."""
        return -1

    def _room(self, like: Tensor, rows: int) -> Tensor:
        return like.new_empty(rows, like.shape[1], self.capacity, like.shape[3])


def make_cache(config: Any, capacity: int) -> Cache:
    """A cache for one rollout of a model with this configuration.

    Plain attention layers get preallocated room. A model that mixes in other layers (sliding windows, recurrence)
    gets transformers' own dynamic cache, whose rows can be picked the same way through `reorder_cache`.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    dynamic = DynamicCache(config=config)
    if all(type(layer) is DynamicLayer for layer in dynamic.layers):
        return Cache(layers=[PreallocatedLayer(capacity) for _ in dynamic.layers])
    return dynamic
