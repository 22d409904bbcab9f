"""The one question every paradigm asks: how probable are these tokens under this policy?

`score` answers it for any policy. Where the policy can read `Segments` (see `capabilities`) nothing is padded, shared
prompts are computed once and the head sees the predicting tokens alone; elsewhere right-padded rows give the same
numbers.
"""

from __future__ import annotations

import inspect
import logging
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.functional.checks import check_positive
from alignment_modules.functional.logprobs import linear_token_scores, token_entropy, token_log_probs
from alignment_modules.policies.attention import ATTENTION_NAME, plan_attention, register_attention
from alignment_modules.policies.context import check_length, length_limit
from alignment_modules.policies.last_layer import feed_forward_on, find_feed_forward
from alignment_modules.policies.modes import eval_mode
from alignment_modules.policies.segments import Segments

logger = logging.getLogger(__name__)

# How far two orders of the same sum may lie apart, relative to the largest entry.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# What a model may raise that does not know our keywords or shapes.
_REFUSALS = (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError)


@dataclass(frozen=True)
class Scores:
    """What the policy thinks of the targets, in the padded shape that the segments were made from.

    Attributes:
        token_logps: `[rows, time]` log-probabilities in nats, float32 (float64 for a float64 policy), 0 where not
            scored.
        mask: `[rows, time]` bool, where scored.
        entropy: `[rows, time]` entropy in nats of the distribution that each target is one draw of, 0 where not scored;
            None if not asked for.
        correct: `[rows, time]` bool, whether the target is the most probable token; None if not asked for.
        normalizer: `[rows, time]` logsumexp of the logits, 0 where not scored; None if not asked for.
        mean_logp: `[rows, time]` mean log-probability over the vocabulary, 0 where not scored; None if not asked for.
    """

    token_logps: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None
    normalizer: Tensor | None = None
    mean_logp: Tensor | None = None


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


@dataclass(frozen=True)
class _Head:
    """A linear head: `logits = softcap(scale * (hidden @ weight.T + bias))`."""

    linear: nn.Linear
    scale: float
    softcap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


# By policy: the attention implementation it was found with (ours once it is packed), and what was found.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[str | None, Capabilities]] = weakref.WeakKeyDictionary()


def score(
    policy: nn.Module,
    segments: Segments,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    accuracy: bool = False,
    normalizer: bool = False,
    mean_logp: bool = False,
) -> Scores:
    """Log-probabilities of the targets of `segments` under `policy`, differentiable in all its parameters.

    Equal up to rounding to the padded computation `log_softmax(policy(input_ids).logits / temperature)`. Train or eval
    mode is the caller's business, as is `torch.no_grad`. Without any target the result is zero but still hangs on the
    parameters, so that every rank of a distributed run takes part in the backward pass.

    Args:
        policy: A causal language model of transformers, also with peft adapters, or any causal module that maps
            `input_ids` `[batch, time]` to logits `[batch, time, vocabulary]` (a tensor, or an object with `.logits`).
        segments: What to score.
        temperature: Divides the logits, > 0. Use the temperature that the tokens were sampled with.
        entropy: Also compute the entropies, differentiable too.
        accuracy: Also compute whether each target is the most probable token.
        normalizer: Also compute the logsumexp of the logits, differentiable too (for a z-loss).
        mean_logp: Also compute the mean log-probability over the vocabulary, differentiable too (for label smoothing).

    Returns:
        The scores.

    Raises:
        ValueError: If `temperature` is not positive, or the policy's output has no logits of the expected shape.
    """
    check_positive("temperature", temperature)
    ability = capabilities(policy)
    if segments.tokens == 0:
        segments = _one_token(segments)
    model = _language_model(policy)
    check_length(policy, segments.longest, "a row")
    head = _find_head(model) if ability.hidden_states else None
    if ability.packed and (ability.window is None or segments.longest <= ability.window):
        states = _packed_states(model, segments, hidden=head is not None, trim=ability.trims_last_layer)
    else:
        states = _padded_states(policy, segments, hidden=head is not None)

    targets = segments.target_ids
    if head is None:
        log_normalizer = (states / temperature).logsumexp(-1) if normalizer or mean_logp else None
        found = {
            "token_logps": token_log_probs(states, targets, temperature),
            "entropy": token_entropy(states, temperature) if entropy else None,
            "correct": states.argmax(-1) == targets if accuracy else None,
            "normalizer": log_normalizer if normalizer else None,
            "mean_logp": states.mean(-1) / temperature - log_normalizer if mean_logp else None,  # type: ignore[operator]
        }
    else:
        found = linear_token_scores(
            states,
            head.linear.weight,
            targets,
            bias=head.linear.bias,
            temperature=temperature,
            logit_scale=head.scale,
            softcap=head.softcap,
            with_entropy=entropy,
            with_correct=accuracy,
            with_normalizer=normalizer,
            with_mean_logp=mean_logp,
        )._asdict()
    placed: Any = {name: None if values is None else _place(values, segments) for name, values in found.items()}
    return Scores(mask=segments.mask(), **placed)


def capabilities(policy: nn.Module) -> Capabilities:
    """Finds out what the policy can do, from its structure and a small forward pass; remembered and logged once.

    Args:
        policy: As in `score`.

    Returns:
        The capabilities. A policy that can be packed has its attention implementation changed from `sdpa` to
        `segments`, which is `sdpa` in all but `score`'s own forward passes. Any other implementation is kept, and the
        policy padded; set another one later and it is tested anew.
    """
    model = _language_model(policy)
    name, found = _KNOWN.get(policy, (None, None))
    if found is not None and name == _attention_name(model):
        return found
    if model is None:
        found = Capabilities(False, False, "padded rows (not a causal language model of transformers)")
    else:
        found = _probe(policy, model)
    _KNOWN[policy] = (_attention_name(model), found)
    logger.info("%s is scored in %s", type(policy).__name__, found.reason)
    return found


def _place(values: Tensor, segments: Segments) -> Tensor:
    rows, time = segments.shape
    return values.new_zeros(rows * time).scatter(0, segments.slot, values).view(rows, time)


def _one_token(segments: Segments) -> Segments:
    """A stand-in for a batch without targets: the policy still runs, and its parameters stay in the graph."""
    zero = segments.token_ids.new_zeros(1)
    return replace(segments, token_ids=zero, position_ids=zero, lengths=(1,), parents=(-1,))


def _packed_states(model: Any, segments: Segments, *, hidden: bool, trim: bool = False) -> Tensor:
    """Hidden states `[targets, d]` of the predicting tokens, or their logits `[targets, vocabulary]`."""
    plan = plan_attention(segments, model.config.get_text_config().hidden_size)
    source = plan.position[segments.source]
    inputs: dict[str, Any] = {
        "input_ids": segments.token_ids[plan.gather][None],
        # A mask of four dimensions is handed on as it is, so no [row, row] mask is built; our attention reads none.
        "attention_mask": segments.token_ids.new_zeros((1, 1, 0, 0), dtype=torch.bool),
        "position_ids": segments.position_ids[plan.gather][None],
        "use_cache": False,
        "segment_plan": plan,
    }
    with feed_forward_on(model, plan.predicting, len(plan.gather)) if trim else nullcontext():
        if hidden:
            return model.base_model(**inputs).last_hidden_state[0].index_select(0, source)
        return model(**inputs, logits_to_keep=source).logits[0]


def _padded_states(policy: nn.Module, segments: Segments, *, hidden: bool) -> Tensor:
    """The same from right-padded rows."""
    input_ids, attention_mask, row, column = segments.padded()
    model = _language_model(policy)
    inputs: dict[str, Any] = {}
    # A causal policy sees nothing of padding on the right. Without a mask transformers takes its fastest kernels, and
    # no padding token is left with nothing to attend to; other modules get the mask if they have a name for it.
    if model is not None:
        inputs["use_cache"] = False
    elif "attention_mask" in inspect.signature(policy.forward).parameters:
        inputs["attention_mask"] = attention_mask
    limit = length_limit(model)
    if limit is not None and segments.longest > limit:
        return _states_row_by_row(model, input_ids, attention_mask, row, column, hidden=hidden)
    if model is not None and hidden:
        return model.base_model(input_ids=input_ids, **inputs).last_hidden_state[row, column]
    output = policy(input_ids, **inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or len(logits) != len(input_ids) or logits.shape[1] < input_ids.shape[1]:
        found = type(output).__name__ if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"policy {type(policy).__name__} gave {found} for input_ids of shape {tuple(input_ids.shape)}; "
            "expected logits [batch, time, vocabulary], or an object that has them as .logits"
        )
    virtual = logits.shape[1] - input_ids.shape[1]  # prompt tuning puts tokens of its own in front
    return logits[row, column + virtual]


def _states_row_by_row(
    model: Any, input_ids: Tensor, attention_mask: Tensor, row: Tensor, column: Tensor, *, hidden: bool
) -> Tensor:
    """The same from rows without neighbours or padding, for models whose numbers depend on the longest row."""
    found, order = [], []
    for number, length in enumerate(attention_mask.sum(1).tolist()):
        own = (row == number).nonzero().squeeze(1)
        inputs = {"input_ids": input_ids[number : number + 1, :length], "use_cache": False}
        states = model.base_model(**inputs).last_hidden_state if hidden else model(**inputs).logits
        found.append(states[0].index_select(0, column[own]))
        order.append(own)
    return torch.cat(found)[torch.cat(order).argsort()]


def _language_model(policy: nn.Module) -> Any:
    """The transformers model inside the policy, or None."""
    transformers, peft = sys.modules.get("transformers"), sys.modules.get("peft")
    if transformers is None:  # then no object can be one of its models
        return None
    if peft is not None and isinstance(policy, peft.PeftModel):
        if policy.active_peft_config.is_prompt_learning:
            return None
        policy = policy.get_base_model()
    return policy if isinstance(policy, transformers.PreTrainedModel) else None


def _attention_name(model: Any) -> str | None:
    return None if model is None else model.config.get_text_config()._attn_implementation


def _find_head(model: Any) -> _Head | None:
    """The model's head, if it is a plain linear map behind a backbone that can be called on its own."""
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks or model.base_model is model:
        return None
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return _Head(linear, scale, getattr(config, "final_logit_softcapping", None))


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
    reason = f"packed rows with shared prompts{limit} (attention implementation set from {name} to segments), {head}"
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
    head = _find_head(model)
    if head is None:
        return "not a plain linear layer"
    input_ids = _random_ids(model, 6)[None]
    try:
        expected = model(input_ids=input_ids, use_cache=False).logits
        logits = head(model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state)
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
        packed = _packed_states(model, segments, hidden=hidden)
        padded = _padded_states(policy, segments, hidden=hidden)
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
        return None, _close(_packed_states(model, fewer, hidden=hidden, trim=True), padded[some])
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
    """Evaluation mode without gradients and autocast; every module gets its own mode back."""
    device = next((parameter.device.type for parameter in policy.parameters()), "cpu")
    with eval_mode(policy), torch.no_grad(), torch.autocast(device, enabled=False):
        yield
