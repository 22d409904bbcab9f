"""Attention over `Segments`, registered with transformers under the name `segments`.

A model whose attention implementation is `segments` behaves exactly as with `sdpa`, except in a forward pass that brings an
`AttentionPlan` as the keyword `segment_plan`: there each segment attends to its parent and to itself, causally, and to nothing else.
The plan travels with the keywords of the forward pass, so gradient checkpointing's second forward pass takes the same path.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignment_modules.policies.segments import Segments

ATTENTION_NAME = "segments"
# Keywords by which models ask for something the plan does not do; a sliding window is checked against the context length.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sinks", "head_mask")


@dataclass(eq=False)
class AttentionPlan:
    """How to attend, made once for a `Segments` and used by all layers, forward and backward.

    Attributes:
        lengths: Tokens of each segment.
        parents: Parent of each segment or -1.
        longest: Tokens of the longest context.
        calls: Attention calls that have read the plan.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    longest: int
    calls: int = 0
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)


_PLANS: weakref.WeakKeyDictionary[Segments, AttentionPlan] = weakref.WeakKeyDictionary()


def plan_attention(segments: Segments) -> AttentionPlan:
    """Returns the plan of these segments, made at the first call."""
    plan = _PLANS.get(segments)
    if plan is None:
        plan = _PLANS[segments] = AttentionPlan(segments.lengths, segments.parents, segments.longest)
    return plan


def register_attention() -> None:
    """Makes the implementation known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, segment_attention_forward)
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
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: by plan where there is one, else `sdpa`.

    Args:
        module: The attention layer.
        query: `[1, heads, tokens, head_dim]`.
        key: `[1, key_value_heads, tokens, head_dim]`.
        value: `[1, key_value_heads, tokens, head_dim]`.
        attention_mask: Ignored with a plan.
        dropout: Attention dropout.
        scaling: Factor of the scores.
        segment_plan: The plan, or None.
        **kwargs: What the model passes beside.

    Returns:
        `[1, tokens, heads, head_dim]` and None.

    Raises:
        ValueError: If the model asks for attention that the plan cannot give.
    """
    if segment_plan is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} in {type(module).__name__}: segment attention has no {name}")
    window = kwargs.get("sliding_window")
    if window is not None and window < segment_plan.longest:
        raise ValueError(f"sliding_window={window} in {type(module).__name__} is shorter than a context of {segment_plan.longest}")
    if not (kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)):
        raise ValueError(f"is_causal=False in {type(module).__name__}: segment attention is causal")
    segment_plan.calls += 1
    return _attend(segment_plan, query, key, value, dropout, scaling), None


def _attend(
    plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    lengths = list(plan.lengths)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)
    outputs = []
    for index, parent in enumerate(plan.parents):
        if parent < 0:
            out = F.scaled_dot_product_attention(
                q[index], k[index], v[index], dropout_p=dropout, is_causal=True, scale=scaling
            )
        else:
            shape = (lengths[index], lengths[parent] + lengths[index])
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(lengths[parent])
            out = F.scaled_dot_product_attention(
                q[index],
                torch.cat((k[parent], k[index]), 2),
                torch.cat((v[parent], v[index]), 2),
                attn_mask=mask,
                dropout_p=dropout,
                scale=scaling,
            )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1)
