"""Attention over `Segments`, registered with transformers under the name `segments`.

A model whose attention implementation is `segments` behaves exactly as with `sdpa`, except in a forward pass that
brings an `AttentionPlan` as the keyword `segment_plan`: there each segment attends to its parent and to itself,
causally, and to nothing else. The plan travels with the keywords of the forward pass, so the second forward pass of
gradient checkpointing takes the same path.

The plan sorts the segments by length, so that segments of one length lie side by side and a view of the row is a batch
for one call of PyTorch's kernel: no copies, no masks, no padding. Where a call costs more than a few padding tokens, a
bucket also takes slightly shorter segments. Completions see the prompt's keys and values in front of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignment_modules.policies.segments import Segments

ATTENTION_NAME = "segments"
# Keywords by which models ask for what a plan cannot do; a sliding window is compared with the longest context.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")
# Padding tokens worth one kernel call saved, forward and backward. On a CPU a call costs about 0.1 ms and a token
# through one layer, of about 12 hidden_size^2 parameters, about 0.05 ms at hidden_size 256. An accelerator computes
# tokens faster than it launches kernels.
_PADDING_PER_CALL_CPU = 110_000  # / hidden_size^2
_PADDING_PER_CALL_ELSEWHERE = 128


@dataclass(frozen=True)
class Bucket:
    """Segments that are attended to in one call.

    Attributes:
        width: Tokens of each, padding included.
        rows: The segments, in the order of their tokens.
        prefix: Tokens of their parents; 0 without.
        parents: The parent segment of each; empty without.
    """

    width: int
    rows: tuple[int, ...]
    prefix: int = 0
    parents: tuple[int, ...] = ()


@dataclass(eq=False)
class AttentionPlan:
    """How to lay out the tokens and how to attend, made once for a `Segments` and used by all layers.

    Attributes:
        buckets: What is attended to together; first those without parents.
        gather: `[row]` int64, which token of the segments stands where in the row; a repeated one is padding.
        position: `[tokens]` int64, where each token of the segments stands in the row.
        predicting: `[distinct sources]` int64, ascending, the places in the row that some target is predicted from.
        longest: Tokens of the longest context.
        calls: How often an attention layer has used the plan.
    """

    buckets: tuple[Bucket, ...]
    gather: Tensor
    position: Tensor
    predicting: Tensor
    longest: int
    calls: int = 0
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def mask(self, width: int, prefix: int) -> Tensor:
        """Lower-right causal mask `[width, prefix + width]` bool: all of the prefix, and causally its own tokens."""
        if (width, prefix) not in self._masks:
            with torch.inference_mode(False):  # it may serve a backward pass later
                ones = torch.ones((width, prefix + width), dtype=torch.bool, device=self.gather.device)
                self._masks[width, prefix] = ones.tril(prefix)
        return self._masks[width, prefix]


_PLANS: weakref.WeakKeyDictionary[Segments, AttentionPlan] = weakref.WeakKeyDictionary()


def plan_attention(segments: Segments, hidden_size: int) -> AttentionPlan:
    """Returns the plan of these segments, made at the first call.

    Args:
        segments: At least one segment.
        hidden_size: Of the model, to weigh padding against calls. A plan made for another model serves as well.

    Returns:
        The plan, on the segments' device.
    """
    plan = _PLANS.get(segments)
    if plan is None:
        with torch.inference_mode(False):
            plan = _PLANS[segments] = _make_plan(segments, hidden_size)
    return plan


def _make_plan(segments: Segments, hidden_size: int) -> AttentionPlan:
    device = segments.token_ids.device
    lengths, parents = segments.lengths, segments.parents
    padding = _PADDING_PER_CALL_CPU // hidden_size**2 if device.type == "cpu" else _PADDING_PER_CALL_ELSEWHERE
    lone = [index for index, parent in enumerate(parents) if parent < 0]
    children = [index for index, parent in enumerate(parents) if parent >= 0]
    buckets = [Bucket(lengths[rows[0]], tuple(rows)) for rows in _group(lone, lengths, padding)]
    # Neighbours in the row: the same prefix length, then the same length, then the same parent.
    children.sort(key=lambda index: (lengths[parents[index]], parents[index]))
    for prefix, members in groupby(children, key=lambda index: lengths[parents[index]]):
        for rows in _group(list(members), lengths, padding):
            buckets.append(Bucket(lengths[rows[0]], tuple(rows), prefix, tuple(parents[row] for row in rows)))

    order = torch.tensor([row for bucket in buckets for row in bucket.rows])
    own = torch.tensor(lengths)
    starts = (own.cumsum(0) - own)[order]
    own = own[order]
    widths = torch.tensor([bucket.width for bucket in buckets for _ in bucket.rows])
    offset = torch.arange(int(widths.sum())) - (widths.cumsum(0) - widths).repeat_interleave(widths)
    real = offset < own.repeat_interleave(widths)
    gather = starts.repeat_interleave(widths) + torch.where(real, offset, 0)
    position = torch.empty(segments.tokens, dtype=torch.int64)
    position[gather[real]] = real.nonzero().squeeze(1)
    return AttentionPlan(
        tuple(buckets),
        gather.to(device, non_blocking=True),
        position.to(device, non_blocking=True),
        position[(segments.host or segments).source.cpu().unique()].sort().values.to(device, non_blocking=True),
        segments.longest,
    )


def _group(rows: list[int], lengths: Sequence[int], padding: int) -> list[list[int]]:
    """Groups segments from long to short; a shorter length joins a group if that pads at most `padding` tokens."""
    groups: list[list[int]] = []
    for length, same in groupby(sorted(rows, key=lambda row: -lengths[row]), key=lambda row: lengths[row]):
        members = list(same)
        if groups and len(members) * (lengths[groups[-1][0]] - length) <= padding:
            groups[-1].extend(members)
        else:
            groups.append(members)
    return groups


def register_attention() -> None:
    """Makes the implementation known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    # A compiled layer leaves its graph around it: the buckets are others in each batch.
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(segment_attention_forward))
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def segment_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: by plan where there is one, else `sdpa`.

    Args:
        module: The attention layer.
        query: `[1, heads, row, head_dim]`, tokens as the plan lays them out.
        key: `[1, key_value_heads, row, head_dim]`.
        value: `[1, key_value_heads, row, head_dim]`.
        attention_mask: Not read with a plan.
        dropout: Attention dropout.
        scaling: Factor of the scores.
        segment_plan: The plan, or None.
        **kwargs: What the model passes beside.

    Returns:
        `[1, row, heads, head_dim]` and None.

    Raises:
        ValueError: If the model asks for attention that a plan cannot give.
    """
    if segment_plan is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _check_request(module, segment_plan, kwargs)
    segment_plan.calls += 1
    if torch.is_autocast_enabled(query.device.type):  # once for all buckets
        query, key = query.to(value.dtype), key.to(value.dtype)
    return _attend(segment_plan, query, key, value, dropout, scaling), None


def _check_request(module: nn.Module, plan: AttentionPlan, request: dict[str, Any]) -> None:
    layer = type(module).__name__
    for name in _UNSUPPORTED:
        if request.get(name) is not None:
            raise ValueError(f"{layer} asks for {name}, which attention over segments does not have")
    window = request.get("sliding_window")
    if window is not None and window < plan.longest:
        raise ValueError(f"{layer} has sliding_window={window}, shorter than a context of {plan.longest} tokens")
    is_causal = request.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{layer} is not causal; attention over segments is")


def _attend(
    plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    sizes = [bucket.width * len(bucket.rows) for bucket in plan.buckets]
    # Split, not slice: the backward pass of a slice fills a whole row with zeros.
    queries, keys, values = (part.transpose(1, 2).split(sizes, 1) for part in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    shared = {parent for bucket in plan.buckets for parent in bucket.parents}
    of_parent: dict[int, tuple[Tensor, Tensor]] = {}
    outputs = []
    for bucket, size, q, k, v in zip(plan.buckets, sizes, queries, keys, values, strict=True):
        q, k, v = (part.reshape(-1, bucket.width, *part.shape[2:]).transpose(1, 2) for part in (q, k, v))
        if bucket.prefix:
            k, v = (_with_prefix(bucket, part, of_parent, which) for which, part in enumerate((k, v)))
        elif not shared.isdisjoint(bucket.rows):
            of_parent.update(zip(bucket.rows, zip(k.unbind(0), v.unbind(0), strict=True), strict=True))
        output = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=plan.mask(bucket.width, bucket.prefix) if bucket.prefix else None,
            dropout_p=dropout,
            is_causal=not bucket.prefix,
            scale=scaling,
            enable_gqa=grouped,
        )
        outputs.append(output.transpose(1, 2).reshape(1, size, query.shape[1], -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _with_prefix(bucket: Bucket, own: Tensor, of_parent: dict[int, tuple[Tensor, Tensor]], which: int) -> Tensor:
    """Puts the parents' keys (`which` 0) or values (1) in front of the children's `[rows, heads, width, head_dim]`."""
    parents = [of_parent[parent][which][:, : bucket.prefix] for parent in bucket.parents]
    if len(set(bucket.parents)) == 1:
        return torch.cat((parents[0].expand(len(parents), *parents[0].shape), own), 2)
    return torch.cat((torch.stack(parents), own), 2)
