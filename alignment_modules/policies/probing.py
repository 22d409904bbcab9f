"""What a policy can do, found by its structure and by numbers: a step of building it.

Where the attention of a model can be replaced by one that reads segments, it is, and stays so. The new one is `sdpa` in
all but our own forward passes.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.attention import ATTENTION_NAME, plan_attention, register_attention
from alignment_modules.policies.compiling import without_graphs
from alignment_modules.policies.context import length_limit
from alignment_modules.policies.forward import classifies, find_head, language_model, packed_states, padded_states
from alignment_modules.policies.last_layer import find_feed_forward
from alignment_modules.policies.modes import eval_mode
from alignment_modules.policies.segments import Segments
from alignment_modules.policies.sharded import gathered

logger = logging.getLogger(__name__)

# How far two orders of the same sum may lie apart, relative to the largest entry.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# What a model may raise that does not know our keywords or shapes.
_REFUSALS = (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError)


@dataclass(frozen=True)
class Capabilities:
    """What a policy can do.

    Attributes:
        packed: Reads segments, so that nothing is padded and a shared prompt is computed once.
        hidden_states: The head is a plain linear map that can be applied to the predicting tokens' hidden states alone.
        reason: Why, in a sentence.
        window: Longest context in tokens that may be packed, for models with a sliding window; None for no limit.
        trims_last_layer: The last layer's feed-forward block may be given the predicting tokens alone.
    """

    packed: bool
    hidden_states: bool
    reason: str
    window: int | None = None
    trims_last_layer: bool = False


# By policy: the attention implementation it was found with (ours once it is packed), and what was found.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[str | None, Capabilities]] = weakref.WeakKeyDictionary()


def prepare(policy: nn.Module) -> Capabilities:
    """Finds out what the policy can do, from its structure and a small forward pass; remembered and logged once.

    Args:
        policy: As in `read`.

    Returns:
        The capabilities. A policy that can be packed has its attention implementation changed from `sdpa` to
        `segments`, which is `sdpa` in all but our own forward passes. Any other implementation is kept, and the
        policy padded; set another one later and it is tested anew.
    """
    model = language_model(policy)
    name, found = _KNOWN.get(policy, (None, None))
    if found is not None and name == _attention_name(model):
        return found
    if any(parameter.is_meta for parameter in policy.parameters()):  # nothing to compute with yet
        return Capabilities(False, False, "padded rows (its weights are not there yet)")
    if model is None:
        found = Capabilities(False, False, "padded rows (not a causal language model of transformers)")
    else:
        found = _probe(policy, model)
    _KNOWN[policy] = (_attention_name(model), found)
    logger.info("scoring: %s is read in %s", type(policy).__name__, found.reason)
    return found


def adopt(policy: nn.Module, found: Capabilities) -> None:
    """Takes over what `prepare` found out about the same policy in another process.

    Args:
        policy: As in `read`.
        found: What it can do.
    """
    model: Any = language_model(policy)
    if found.packed:
        register_attention()
        model.set_attn_implementation(ATTENTION_NAME)
    _KNOWN[policy] = (_attention_name(model), found)


def _attention_name(model: Any) -> str | None:
    return None if model is None else model.config.get_text_config()._attn_implementation


def _probe(policy: nn.Module, model: Any) -> Capabilities:
    """Tries the backbone with our head, then the packed against the padded pass, on a few random tokens."""
    name, trim = _attention_name(model), False
    with _quiet(policy):
        objection = _object_to_head(model)
        hidden = objection is None
        window, refusal = _refuse_by_structure(model, name)
        if refusal is None:
            register_attention()
            model.set_attn_implementation(ATTENTION_NAME)
            refusal, trim = _refuse_by_numbers(policy, model, hidden=hidden)
            if refusal is not None:
                model.set_attn_implementation("sdpa")
    head = "head on the predicting tokens alone" if hidden else f"head called as it is ({objection})"
    if refusal is not None:
        return Capabilities(False, hidden, f"padded rows ({refusal}), {head}")
    limit = "" if window is None else f" up to {window} tokens of context"
    changed = "" if name == ATTENTION_NAME else f"set from {name} to "  # a copy of a policy has it already
    reason = f"packed rows with shared prompts{limit} (attention implementation {changed}segments), {head}"
    return Capabilities(True, hidden, reason, window, trim)


def _refuse_by_structure(model: Any, name: str | None) -> tuple[int | None, str | None]:
    """Longest context that sees plain causal attention, and why the model cannot be packed (None: it may)."""
    config = model.config.get_text_config()
    if name not in ("sdpa", ATTENTION_NAME):
        return None, f"attention implementation {name} is kept; only sdpa is replaced by packed attention"
    if not getattr(model, "_supports_attention_backend", False) or not model._can_set_attn_implementation():
        return None, "no attention interface"
    if getattr(model.config, "is_encoder_decoder", False) or getattr(config, "is_causal", True) is False:
        return None, "not a causal decoder"
    kinds = set(getattr(config, "layer_types", None) or ())
    if foreign := sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"}):
        return None, f"layers of type {', '.join(foreign)}"
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    windows.append(length_limit(model))
    return min((int(window) for window in windows if window), default=None), None


def _object_to_head(model: Any) -> str | None:
    """None if backbone and our own product with the head's weight give the model's logits, else why not."""
    head = find_head(model)
    if head is None:
        return "not a plain linear layer"
    input_ids = _random_ids(model, 6)[None]
    if int(input_ids[0, -1]) == model.config.get_text_config().pad_token_id:  # a classifier would look before it
        input_ids = (input_ids + 1) % model.get_input_embeddings().weight.shape[0]
    try:
        expected = model(input_ids=input_ids, use_cache=False).logits
        logits = head(model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state)
        logits = logits[:, -1] if classifies(model) else logits
    except _REFUSALS as error:
        return _first_line(error)
    return None if _close(logits, expected) else "the model does more than this linear layer"


def _refuse_by_numbers(policy: nn.Module, model: Any, *, hidden: bool) -> tuple[str | None, bool]:
    """None if packed and padded rows agree, else why not; and whether they still do with the last layer trimmed."""
    lengths, parents = (3, 2, 1, 4), (-1, 0, 0, -1)
    ids = _random_ids(model, sum(lengths))
    starts = [3 if parent >= 0 else 0 for parent in parents]
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    every = torch.arange(len(ids), device=ids.device)
    segments = Segments(ids, positions.to(ids.device), lengths, parents, every, ids, every, (1, len(ids)))
    try:
        packed = packed_states(model, segments, hidden=hidden).read
        padded = padded_states(policy, segments, hidden=hidden).read
    except _REFUSALS as error:
        return _first_line(error), False
    config = model.config.get_text_config()
    calls = plan_attention(segments, config.hidden_size).calls
    if calls != config.num_hidden_layers:  # numbers do not show it where a layer's output projection starts at zero
        return f"{calls} of {config.num_hidden_layers} layers read the segments", False
    if not _close(packed, padded):
        return "packed and padded rows differ", False
    if find_feed_forward(model) is None:
        return None, False
    some = every[1::3]
    fewer = replace(segments, source=some, target_ids=ids[some], slot=some)
    try:
        return None, _close(packed_states(model, fewer, hidden=hidden, trim=True).read, padded[some])
    except _REFUSALS:
        return None, False


def _random_ids(model: Any, count: int) -> Tensor:
    weight = model.get_input_embeddings().weight
    return torch.randint(weight.shape[0], (count,), generator=torch.Generator().manual_seed(0)).to(weight.device)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    tolerance = max(_TOLERANCES.get(tensor.dtype, 1e-4) for tensor in (one, other))
    one, other = one.double(), other.double()
    return bool((one - other).abs().max() <= tolerance * other.abs().max().clamp_min(1e-3))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet(policy: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, autocast and graphs; every module gets its own mode back."""
    device = next((parameter.device.type for parameter in policy.parameters()), "cpu")
    with (
        eval_mode(policy),
        torch.no_grad(),
        torch.autocast(device, enabled=False),
        gathered(policy),
        without_graphs(policy),
    ):
        yield
