"""The one question every paradigm asks: how probable are these tokens under this policy?

`score` answers it for any policy. Where the policy can read `Segments` (see `capabilities`) nothing is padded, shared prompts are
computed once, and the head sees the predicting tokens alone; elsewhere the same numbers come from right-padded rows.
"""

from __future__ import annotations

import inspect
import logging
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.functional.logprobs import linear_token_scores, token_entropy, token_log_probs
from alignment_modules.policies.attention import ATTENTION_NAME, plan_attention, register_attention
from alignment_modules.policies.segments import Segments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """What the policy thinks of the targets.

    Attributes:
        token_logps: `[rows, time]` log-probabilities in nats, float32 (float64 for a float64 policy), 0 where not scored.
        mask: `[rows, time]` bool, where scored.
        entropy: `[rows, time]` entropy of the distribution each target was drawn from, in nats, 0 where not scored; None if not asked.
        correct: `[rows, time]` bool, whether the target is the most probable token; None if not asked.
    """

    token_logps: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None


@dataclass(frozen=True)
class Capabilities:
    """What a policy can do.

    Attributes:
        packed: Reads segments, so nothing is padded.
        shared_prefix: Computes a shared prompt once.
        hidden_states: Its head is a plain linear map that can be applied to the predicting tokens' hidden states alone.
        reason: Why, in a sentence.
        window: Longest context that may be packed, in tokens, for models with a sliding window; None for no limit.
    """

    packed: bool
    shared_prefix: bool
    hidden_states: bool
    reason: str
    window: int | None = None


@dataclass(frozen=True)
class _Head:
    """A linear head: `logits = softcap(scale * (hidden @ weight.T + bias))`."""

    linear: nn.Linear
    scale: float
    softcap: float | None


_CAPABILITIES: weakref.WeakKeyDictionary[nn.Module, Capabilities] = weakref.WeakKeyDictionary()


def score(
    policy: nn.Module,
    segments: Segments,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    accuracy: bool = False,
) -> Scores:
    """Log-probabilities of the targets of `segments` under `policy`, differentiable in all its parameters.

    Equal to the padded computation `log_softmax(policy(input_ids).logits / temperature)` up to rounding. The policy's train or
    eval mode is the caller's business, as is `torch.no_grad`. With no target at all the result is zero but still hangs on the
    parameters, so that every rank of a distributed run takes part in the backward pass.

    Args:
        policy: A causal language model of transformers, also with peft adapters, or any module that maps `input_ids`
            `[batch, time]` to logits `[batch, time, vocabulary]` (a tensor, or an object with `.logits`).
        segments: What to score.
        temperature: Divides the logits, > 0. Use the temperature that the tokens were sampled with.
        entropy: Also compute the entropies.
        accuracy: Also compute whether each target is the most probable token.

    Returns:
        The scores, in the padded shape that the segments were made from.

    Raises:
        ValueError: If `temperature` is not positive, or the policy's output has no logits of the expected shape.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    ability = capabilities(policy)
    if segments.tokens == 0:
        segments = _one_token(segments)
    if ability.packed and (ability.window is None or segments.longest <= ability.window):
        states = _packed_states(policy, segments, hidden=ability.hidden_states)
    else:
        states = _padded_states(policy, segments, hidden=ability.hidden_states)
    targets = segments.target_ids
    correct = entropies = None
    if ability.hidden_states:
        head = _find_head(policy)
        assert head is not None
        scores = linear_token_scores(
            states,
            head.linear.weight,
            targets,
            bias=head.linear.bias,
            temperature=temperature,
            logit_scale=head.scale,
            softcap=head.softcap,
            with_entropy=entropy,
            with_correct=accuracy,
        )
        logps, entropies, correct = scores.token_logps, scores.entropy, scores.correct
    else:
        logps = token_log_probs(states, targets, temperature)
        if entropy:
            entropies = token_entropy(states, temperature)
        if accuracy:
            correct = states.argmax(-1) == targets
    return Scores(
        token_logps=_place(logps, segments),
        mask=segments.mask(),
        entropy=None if entropies is None else _place(entropies, segments),
        correct=None if correct is None else _place(correct, segments),
    )


def capabilities(policy: nn.Module) -> Capabilities:
    """Finds out what the policy can do, by its structure and by a small forward pass; remembered per module and logged once.

    Args:
        policy: As in `score`.

    Returns:
        The capabilities. A policy that can be packed has its attention implementation set to `segments`, which is `sdpa` in all
        but `score`'s own forward passes.
    """
    known = _CAPABILITIES.get(policy)
    model = _language_model(policy)
    if known is not None and not (known.packed and model is not None and _attention_name(model) != ATTENTION_NAME):
        return known
    found = Capabilities(False, False, False, "not a transformers model: padded rows")
    if model is not None:
        found = _probe(policy, model)
    _CAPABILITIES[policy] = found
    logger.info("%s: %s", type(policy).__name__, found.reason)
    return found


def _place(values: Tensor, segments: Segments) -> Tensor:
    rows, time = segments.shape
    return values.new_zeros(rows * time).scatter(0, segments.slot, values).view(rows, time)


def _one_token(segments: Segments) -> Segments:
    """A stand-in for a batch without targets, so that the policy still runs and its parameters stay in the graph."""
    zero = segments.token_ids.new_zeros(1)
    return replace(segments, token_ids=zero, position_ids=zero, lengths=(1,), parents=(-1,))


def _packed_states(policy: nn.Module, segments: Segments, *, hidden: bool) -> Tensor:
    """Hidden states `[targets, d]` of the predicting tokens, or their logits `[targets, vocabulary]`."""
    model = _language_model(policy)
    assert model is not None
    inputs: dict[str, Any] = {
        "input_ids": segments.token_ids[None],
        # A mask of four dimensions is handed on as it is: no [tokens, tokens] mask is built, and ours is not read.
        "attention_mask": segments.token_ids.new_zeros((1, 1, 0, 0), dtype=torch.bool),
        "position_ids": segments.position_ids[None],
        "use_cache": False,
        "segment_plan": plan_attention(segments),
    }
    if hidden:
        return model.base_model(**inputs).last_hidden_state[0].index_select(0, segments.source)
    return model(**inputs, logits_to_keep=segments.source).logits[0]


def _padded_states(policy: nn.Module, segments: Segments, *, hidden: bool) -> Tensor:
    """The same from right-padded rows."""
    input_ids, attention_mask, row, column = segments.padded()
    model = _language_model(policy)
    if hidden:
        assert model is not None
        output = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return output.last_hidden_state[row, column]
    inputs: dict[str, Any] = {}
    accepted = inspect.signature(policy.forward).parameters
    if model is not None or "attention_mask" in accepted:
        inputs["attention_mask"] = attention_mask
    if model is not None:
        inputs["use_cache"] = False
    output = policy(input_ids, **inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[0] != input_ids.shape[0]:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(
            f"policy {type(policy).__name__} gave {found} for input_ids of shape {tuple(input_ids.shape)}; "
            "expected logits [batch, time, vocabulary], or an object with such `.logits`"
        )
    extra = logits.shape[1] - input_ids.shape[1]  # prompt tuning puts virtual tokens in front
    return logits[row, column + extra]


def _language_model(policy: nn.Module) -> Any:
    """The transformers model inside the policy, or None."""
    transformers, peft = sys.modules.get("transformers"), sys.modules.get("peft")
    if transformers is None:
        return None
    if peft is not None and isinstance(policy, peft.PeftModel):
        if policy.active_peft_config.is_prompt_learning:
            return None
        policy = policy.get_base_model()
    return policy if isinstance(policy, transformers.PreTrainedModel) else None


def _attention_name(model: Any) -> str | None:
    return getattr(model.config.get_text_config(), "_attn_implementation", None)


def _find_head(policy: nn.Module) -> _Head | None:
    """The policy's head, if it is a plain linear map."""
    model = _language_model(policy)
    head = None if model is None else model.get_output_embeddings()
    if type(head) is not nn.Linear or model.base_model is model:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return _Head(head, scale, getattr(config, "final_logit_softcapping", None))


def _probe(policy: nn.Module, model: Any) -> Capabilities:
    """Tries the packed and the padded path on a few random tokens."""
    name = _attention_name(model)
    with _quiet(policy):
        hidden, why_not = _try_head(policy, model)
        head = "the head reads the predicting tokens alone" if hidden else f"the head is called as it is ({why_not})"
        window, refusal = _structure(model, name)
        if refusal is None:
            register_attention()
            model.set_attn_implementation(ATTENTION_NAME)
            refusal = _try_packed(policy, model, hidden)
            if refusal is not None:
                model.set_attn_implementation(name)
    if refusal is not None:
        return Capabilities(False, False, hidden, f"padded rows ({refusal}); {head}")
    limit = "" if window is None else f" up to {window} tokens of context"
    return Capabilities(
        True, True, hidden, f"packed rows with shared prompts{limit}, attention `{name}` replaced by ours; {head}", window
    )


def _structure(model: Any, name: str | None) -> tuple[int | None, str | None]:
    """Longest context that is plain causal attention, and the reason why the model cannot be packed."""
    config = model.config.get_text_config()
    if name not in ("sdpa", ATTENTION_NAME):
        return None, f"attention implementation `{name}` is kept; set `sdpa` to have it packed"
    if not getattr(model, "_supports_attention_backend", False) or not model._can_set_attn_implementation():
        return None, "the model has no attention interface"
    if getattr(model.config, "is_encoder_decoder", False) or getattr(config, "is_causal", True) is False:
        return None, "the model is not causal"
    kinds = set(getattr(config, "layer_types", None) or ())
    if foreign := kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        return None, f"layers of type {sorted(foreign)}"
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    return min((int(window) for window in windows if window), default=None), None


def _try_head(policy: nn.Module, model: Any) -> tuple[bool, str]:
    """Whether our product with the head's weight gives the model's own logits."""
    if _find_head(policy) is None:
        return False, "it is not a plain linear layer"
    try:
        input_ids = _random_ids(model, 6)[None]
        expected = model(input_ids=input_ids, use_cache=False).logits[0]
        states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0]
        head = _find_head(policy)
        assert head is not None
        logits = head.linear(states) * head.scale
        if head.softcap is not None:
            logits = torch.tanh(logits / head.softcap) * head.softcap
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        return False, f"the backbone could not be called: {error}"
    return _close(logits, expected), "the model does more than its linear layer"


def _try_packed(policy: nn.Module, model: Any, hidden: bool) -> str | None:
    """None if the packed pass equals the padded one, else the reason why not."""
    ids = _random_ids(model, 18)
    lengths, parents = (5, 3, 4, 6), (-1, 0, 0, -1)
    position = torch.cat([torch.arange(n) + (5 if p >= 0 else 0) for n, p in zip(lengths, parents, strict=True)])
    everywhere = torch.arange(18, device=ids.device)
    segments = Segments(ids, position.to(ids.device), lengths, parents, everywhere, ids, everywhere, (1, 18))
    plan = plan_attention(segments)
    try:
        packed = _packed_states(policy, segments, hidden=hidden)
        padded = _padded_states(policy, segments, hidden=hidden)
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if plan.calls != layers:
        return f"{plan.calls} of {layers} layers read the segments"
    return None if _close(packed, padded) else "packed and padded passes differ"


def _random_ids(model: Any, count: int) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (count,), generator=generator).to(model.device)


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to the rounding of their dtype."""
    if one.shape != other.shape:
        return False
    tolerance = 50 * torch.finfo(other.dtype).eps ** (1.0 if other.dtype == torch.float64 else 0.9)
    difference = (one.double() - other.double()).abs().max()
    return bool(difference <= max(tolerance, 1e-9) * other.double().abs().max().clamp_min(1e-3))


@contextmanager
def _quiet(policy: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and autocast; every module's own mode is given back."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    device_type = next((parameter.device.type for parameter in policy.parameters()), "cpu")
    try:
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
