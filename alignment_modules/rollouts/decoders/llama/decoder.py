"""Decoding for the Llama family without the model's forward: fused weights, shared prompts, little Python."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignment_modules.rollouts.decoders.llama.bins import Bins
from alignment_modules.rollouts.decoders.llama.weights import Layer, read_weights
from alignment_modules.rollouts.prompts import Prompts


class _Views(NamedTuple):
    """One layer's keys and values, as a step reads and writes them."""

    keys: Tensor  # [bins * kv_heads, head_dim, longest] of the prompts
    values: Tensor  # [bins * kv_heads, longest, head_dim]
    own_keys: Tensor  # [places * kv_heads, head_dim, capacity] of the samples
    own_values: Tensor  # [places * kv_heads, capacity, head_dim]
    key_slots: Tensor  # [capacity, bins, kv_heads, size, head_dim / 2] complex
    value_slots: Tensor  # [capacity, bins, kv_heads, size, head_dim]


class FastDecoder:
    """Decodes a model of the Llama family from a copy of its weights.

    Rows live in bins (`Bins`): a prompt's keys and values are kept once per
    bin, and the query heads of all its samples that read one key/value head are the rows of one matrix product. Each
    sample's own keys and values are in preallocated room. When samples finish, the bins are packed again.

    Args:
        policy: A policy for which `no_fast_decoding` gives None.
        prompts: Prompts without padding.
        num_samples: Continuations per prompt.
        max_new_tokens: Tokens that will be appended.
    """

    bins: Bins
    views: list[_Views]

    def __init__(self, policy: nn.Module, prompts: Prompts, num_samples: int, max_new_tokens: int) -> None:
        self.weights = read_weights(policy)
        self.prompts, self.capacity, self.time = prompts, max_new_tokens, 0
        self.rotations = self.weights.rotations(prompts.longest + max_new_tokens)
        self.group = self.weights.heads // self.weights.kv_heads
        self.prompt_of_row = torch.arange(prompts.count).repeat_interleave(num_samples)
        self.prompt_states: list[
            tuple[Tensor, Tensor]
        ] = []  # per layer keys, values [prompts, kv_heads, time, head_dim]
        self.own_states: list[tuple[Tensor, Tensor]] = []  # per layer [bins, kv_heads, size, capacity, head_dim]
        self.past: list[tuple[Tensor, Tensor]] = []  # per layer of a resumed one [prompts, time, kv_heads, head_dim]
        self.cached = torch.zeros_like(prompts.lengths)

    def prefill(self) -> Tensor:  # noqa: D102
        weights, prompts = self.weights, self.prompts
        mask = prompts.mask
        new = torch.arange(prompts.longest, device=mask.device) >= self.cached[:, None]
        real = mask & new
        flat = real.flatten().nonzero().squeeze(1)
        last = (prompts.lengths - self.cached).cumsum(0) - 1
        whole = len(flat) == real.numel() or bool(mask.all())
        x = weights.embedding[prompts.ids[real]]
        rotation = self.rotations[flat % prompts.longest][:, None]
        for number, layer in enumerate(weights.layers):
            past = self.past[number] if self.past else (None, None)
            qkv = F.linear(normalized(x, layer.epsilons[0]), layer.qkv, layer.qkv_bias)
            query, key, value = self._split(layer, qkv.view(len(x), -1, weights.head_dim))
            key = self._padded(torch.view_as_real(key * rotation).flatten(-2), flat, past[0])
            value = self._padded(value, flat, past[1])
            self.prompt_states.append((key, value))
            key, value = (states.repeat_interleave(self.group, dim=1) for states in (key, value))
            query = torch.view_as_real(query * rotation).flatten(-2)
            if len(self.prompt_states) < len(weights.layers):
                query = self._padded(query, flat)
                mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
                mixed = mixed.transpose(1, 2).reshape(prompts.count * prompts.longest, -1)[flat]
            else:  # behind the last layer's keys and values, only the last token's output is needed
                x, query = x[last], query[last][:, :, None]
                seen = None if whole else mask[:, None, None]
                mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=1.0)
                mixed = mixed.reshape(prompts.count, -1)
            x = torch.addmm(x, mixed, layer.output)
            gate, up = F.linear(normalized(x, layer.epsilons[2]), layer.gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate, inplace=True).mul_(up), layer.down.t())
        self._pack(torch.arange(len(self.prompt_of_row)))
        return self._head(x)

    def step(self, tokens: Tensor) -> Tensor:  # noqa: D102
        weights, bins, time = self.weights, self.bins, self.time
        if bins.row_of_place is not None:
            tokens = tokens.index_select(0, bins.row_of_place)
        x = weights.embedding.index_select(0, tokens)
        rotation = self.rotations.index_select(0, self.positions)
        query_rotation = rotation.view(bins.count, 1, bins.size, 1, -1)
        key_rotation = rotation.view(bins.count, 1, bins.size, -1)
        self.positions.add_(1)
        self.time += 1
        for layer, views in zip(weights.layers, self.views, strict=True):
            normalized(x, layer.epsilons[0], out=self.normalized)
            if layer.qkv_bias is None:
                torch.mm(self.normalized, layer.qkv.t(), out=self.qkv)
            else:
                torch.addmm(layer.qkv_bias, self.normalized, layer.qkv.t(), out=self.qkv)
            if layer.qk_norm is not None:
                normalized(self.turned, layer.epsilons[1], out=self.turned).mul_(layer.qk_norm)
            torch.mul(self.new_queries, query_rotation, out=self.query_slots)
            torch.mul(self.new_keys, key_rotation, out=views.key_slots[time])
            views.value_slots[time].copy_(self.new_values)
            self._attend(views)
            x = torch.addmm(x, self.mixed, layer.output)
            normalized(x, layer.epsilons[2], out=self.normalized)
            if self.wide_first:
                torch.mm(layer.gate_up, self.normalized.t(), out=self.gate_up)
                F.silu(self.gate, inplace=True).mul_(self.up)
                x.add_(torch.mm(layer.down, self.gate).t())
            else:
                torch.mm(self.normalized, layer.gate_up.t(), out=self.gate_up)
                F.silu(self.gate, inplace=True).mul_(self.up)
                x.addmm_(self.gate, layer.down.t())
        return self._head(x if bins.place_of_row is None else x.index_select(0, bins.place_of_row))

    def keep(self, rows: Tensor) -> None:  # noqa: D102
        self._pack(rows.cpu())

    def resume(self, rows: Tensor, lengths: Tensor, contexts: Prompts, max_new_tokens: int) -> FastDecoder:  # noqa: D102
        longest, device = self.prompts.longest, rows.device
        prompt = self.prompt_of_row.to(device)[rows]
        place = rows if self.bins.place_of_row is None else self.bins.place_of_row[rows]
        before = self.prompts.lengths[prompt][:, None]
        self.cached = before[:, 0] + lengths.clamp(max=self.time)  # the token sampled last is in no cache yet
        column = torch.arange(contexts.longest, device=device)
        time = max(self.time, 1)
        source = torch.where(column < before, column, column - before + longest).clamp(max=longest + time - 1)
        unknown = (column >= self.cached[:, None])[..., None, None]

        def joined(states: Tensor, own: Tensor) -> Tensor:
            own = own.transpose(1, 2).flatten(0, 1)[place, :, :time]
            both = torch.cat((states[prompt], own), dim=2).transpose(1, 2)
            return both[torch.arange(len(rows), device=device)[:, None], source].masked_fill(unknown, 0.0)

        self.past = [
            (joined(keys, own_keys), joined(values, own_values))
            for (keys, values), (own_keys, own_values) in zip(self.prompt_states, self.own_states, strict=True)
        ]
        self.prompts, self.capacity, self.time = contexts, max_new_tokens, 0
        self.rotations = self.weights.rotations(contexts.longest + max_new_tokens)
        self.prompt_of_row = torch.arange(contexts.count)
        self.prompt_states, self.own_states = [], []
        return self

    def _split(self, layer: Layer, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys as complex numbers `[rows, heads, head_dim / 2]`, values `[rows, kv_heads, head_dim]`."""
        turned = qkv[:, : self.weights.heads + self.weights.kv_heads]
        if layer.qk_norm is not None:
            turned = normalized(turned, layer.epsilons[1]) * layer.qk_norm
        turned = as_complex(turned)
        return turned[:, : self.weights.heads], turned[:, self.weights.heads :], qkv[:, -self.weights.kv_heads :]

    def _attend(self, views: _Views) -> None:
        """Attention of each place's new token to its prompt and its own tokens, into `self.mixed`."""
        time, longest = self.time, views.values.shape[1]
        if self.bias is None:
            scores = torch.bmm(self.query, views.keys)
        else:
            scores = torch.baddbmm(self.bias, self.query, views.keys)
        own_scores = torch.bmm(self.own_query, views.own_keys[:, :, :time])
        shares = torch.softmax(torch.cat((scores, own_scores.view(len(scores), -1, time)), dim=-1), dim=-1)
        own_shares = shares.view(len(own_scores), self.group, -1)
        mixed = torch.bmm(shares[:, :, :longest], views.values)
        own_mixed = torch.bmm(own_shares[:, :, longest:], views.own_values[:, :time])
        torch.add(mixed.view_as(self.mixed_slots), own_mixed.view_as(self.mixed_slots), out=self.mixed_slots)

    def _head(self, x: Tensor) -> Tensor:
        weights, rows = self.weights, len(x)
        x = normalized(x, weights.epsilon).mul_(weights.norm)
        if x.is_cpu and (1 < rows <= 10 or 16 <= rows <= 64):
            logits = torch.mm(weights.head, x.t()).t().contiguous()
            return logits if weights.head_bias is None else logits.add_(weights.head_bias)
        return F.linear(x, weights.head, weights.head_bias)

    def _padded(self, states: Tensor, flat: Tensor, past: Tensor | None = None) -> Tensor:
        """`[tokens, heads, size]` of the real tokens as `[prompts, heads, longest, size]`, zero or `past` elsewhere."""
        prompts = self.prompts
        if len(flat) < prompts.count * prompts.longest:
            room = (
                states.new_zeros(prompts.count * prompts.longest, *states.shape[1:])
                if past is None
                else past.flatten(0, 1)
            )
            states = room.index_copy_(0, flat, states)
        return states.view(prompts.count, prompts.longest, *states.shape[1:]).transpose(1, 2)

    def _pack(self, rows: Tensor) -> None:
        """Puts the kept rows into bins, copies what those need, and lays out one step's buffers."""
        weights, device = self.weights, self.weights.embedding.device
        old_place = None
        if self.own_states:
            old_place = rows if self.bins.place_of_row is None else self.bins.place_of_row.cpu()[rows]
        self.prompt_of_row = self.prompt_of_row[rows]
        longest = int(self.prompts.lengths.cpu()[self.prompt_of_row].max())
        # A bin costs reading a prompt's keys and values, a place one row of the layer's matrices; a measured ratio.
        layer = weights.layers[0]
        matrices = layer.qkv.numel() + layer.output.numel() + layer.gate_up.numel() + layer.down.numel()
        bins = Bins.pack(self.prompt_of_row, 37 * longest * weights.kv_heads * weights.head_dim / matrices)
        if old_place is not None and bins.row_of_place is not None:
            old_place = old_place[bins.row_of_place]
        prompt = bins.prompt.to(device)
        places = [None if index is None else index.to(device) for index in (bins.row_of_place, bins.place_of_row)]
        previous, self.bins = self.bins if self.own_states else bins, Bins(bins.count, bins.size, prompt, *places)
        lengths = self.prompts.lengths[prompt]
        self.positions = lengths.repeat_interleave(bins.size) + self.time
        self.bias: Tensor | None = None
        if bool((lengths < longest).any()):
            padding = torch.arange(longest, device=device) >= lengths.repeat_interleave(weights.kv_heads)[:, None, None]
            self.bias = torch.zeros(padding.shape, dtype=weights.embedding.dtype, device=device)
            self.bias.masked_fill_(padding, -torch.inf)
        self._move_states(previous.size, None if old_place is None else old_place.to(device))
        self._lay_out_views(longest)
        self._lay_out_buffers()

    def _move_states(self, old_size: int, old_place: Tensor | None) -> None:
        """Copies the samples' own keys and values to their new places."""
        weights, bins, kv_heads = self.weights, self.bins, self.weights.kv_heads
        shape = (bins.count, kv_heads, bins.size, self.capacity, weights.head_dim)
        rooms = [tuple(weights.embedding.new_empty(shape) for _ in range(2)) for _ in weights.layers]
        if old_place is not None:
            grid = old_place.view(bins.count, 1, bins.size)
            heads = torch.arange(kv_heads, device=grid.device)[:, None]
            source = ((grid // old_size * kv_heads + heads) * old_size + grid % old_size).flatten()
            for room, states in zip(rooms, self.own_states, strict=True):
                for new, old in zip(room, states, strict=True):
                    new.flatten(0, 2)[:, : self.time] = old.flatten(0, 2)[:, : self.time].index_select(0, source)
        self.own_states = [(room[0], room[1]) for room in rooms]

    def _lay_out_views(self, longest: int) -> None:
        self.views = []
        for prompt_states, (own_keys, own_values) in zip(self.prompt_states, self.own_states, strict=True):
            keys, values = (states[self.bins.prompt, :, :longest].flatten(0, 1) for states in prompt_states)
            self.views.append(
                _Views(
                    keys=keys.transpose(1, 2),
                    values=values,
                    own_keys=own_keys.flatten(0, 2).transpose(1, 2),
                    own_values=own_values.flatten(0, 2),
                    key_slots=as_complex(own_keys).movedim(3, 0),
                    value_slots=own_values.movedim(3, 0),
                )
            )

    def _lay_out_buffers(self) -> None:
        """Buffers of one step, and the shapes in which they are read."""
        weights, bins = self.weights, self.bins
        like, head_dim, kv_heads = weights.embedding, weights.head_dim, weights.kv_heads
        intermediate = weights.layers[0].down.shape[1]
        grid = (bins.count, bins.size, kv_heads)
        self.normalized = like.new_empty(bins.places, like.shape[1])
        self.qkv = like.new_empty(bins.places, (weights.heads + 2 * kv_heads) * head_dim)
        heads = self.qkv.view(bins.places, -1, head_dim)
        self.turned = heads[:, :-kv_heads]
        self.new_queries = as_complex(heads[:, : weights.heads]).view(*grid, self.group, -1).transpose(1, 2)
        self.new_keys = as_complex(heads[:, weights.heads : -kv_heads]).view(*grid, -1).transpose(1, 2)
        self.new_values = heads[:, -kv_heads:].view(*grid, head_dim).transpose(1, 2)
        query = like.new_empty(bins.count, kv_heads, bins.size, self.group, head_dim)
        self.query_slots = as_complex(query)
        self.query = query.view(bins.count * kv_heads, bins.size * self.group, head_dim)
        self.own_query = query.view(bins.places * kv_heads, self.group, head_dim)
        self.mixed = like.new_empty(bins.places, weights.heads * head_dim)
        self.mixed_slots = self.mixed.view(*grid, self.group * head_dim).transpose(1, 2)
        # Measured on CPU: wide matrix times skinny one is faster with the wide one first, in full blocks of 16 rows.
        self.wide_first = like.is_cpu and bins.places % 16 == 0
        if self.wide_first:
            self.gate_up = like.new_empty(2 * intermediate, bins.places)
            self.gate, self.up = self.gate_up.chunk(2)
        else:
            self.gate_up = like.new_empty(bins.places, 2 * intermediate)
            self.gate, self.up = self.gate_up.chunk(2, dim=1)


def normalized(x: Tensor, epsilon: float, out: Tensor | None = None) -> Tensor:
    """Root-mean-square normalisation over the last dimension, without a weight."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.mul(x, norm.square_().mul_(1 / x.shape[-1]).add_(epsilon).rsqrt_(), out=out)


def as_complex(x: Tensor) -> Tensor:
    """Neighbouring numbers of the last dimension as complex numbers, in the same memory."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
