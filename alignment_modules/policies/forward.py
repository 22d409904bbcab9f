"""One forward pass of a policy over segments: packed where it reads them, else in right-padded rows."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignment_modules.policies.added_tokens import TrainedRows, trains_rows
from alignment_modules.policies.attention import plan_attention
from alignment_modules.policies.context import length_limit
from alignment_modules.policies.last_layer import feed_forward_on
from alignment_modules.policies.segments import Segments
from alignment_modules.policies.sharded import class_of, is_sharded, is_whole

# What is done to the input embeddings of a forward pass inside a block, given which token of the segments stands where
# in the pass, `[rows, time]` int64.
Noise = Callable[[Tensor], AbstractContextManager[None]]


@dataclass(frozen=True)
class Head:
    """A linear head: `logits = softcap(scale * (hidden @ weight.T + bias))`."""

    linear: nn.Linear | TrainedRows
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Logits `[..., outputs]` of states `[..., hidden]`, computed in `dtype` where one is given."""
        weight: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        if dtype is not None:
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        logits = F.linear(hidden, weight, bias) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class States(NamedTuple):
    """What a forward pass gives.

    Attributes:
        read: Hidden states `[reads, d]` of the tokens that are read, or their logits `[reads, vocabulary]`.
        router_logits: `[tokens, experts]` of each layer with experts, in any order of the tokens, where the model's
            configuration has it give them; else empty.
    """

    read: Tensor
    router_logits: tuple[Tensor, ...]


def packed_states(
    model: Any, segments: Segments, *, hidden: bool, trim: bool = False, noise: Noise | None = None
) -> States:
    """Reads segments in one row without padding.

    Args:
        model: A language model whose attention reads plans.
        segments: At least one token.
        hidden: Whether the hidden states are wanted.
        trim: Whether the last feed-forward block may be left out where nothing is read; no router's logits are given
            then, which would be those of some tokens.
        noise: Added to the input embeddings.
    """
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
    trimmed = feed_forward_on(model, plan.predicting, len(plan.gather)) if trim else nullcontext()
    with trimmed, _noisy(noise, plan.gather[None]):
        output = model.base_model(**inputs) if hidden else model(**inputs, logits_to_keep=source)
    states = output.last_hidden_state[0].index_select(0, source) if hidden else output.logits[0]
    return States(states, () if trim else tuple(layer[plan.position] for layer in _router_logits(output)))


def _noisy(noise: Noise | None, places: Tensor | None) -> AbstractContextManager[None]:
    return nullcontext() if noise is None or places is None else noise(places)


def padded_states(policy: nn.Module, segments: Segments, *, hidden: bool, noise: Noise | None = None) -> States:
    """The same from right-padded rows, for any policy; a shared prompt is routed once in each row."""
    input_ids, attention_mask, row, column = segments.padded()
    places = None
    if noise is not None:  # the tokens' own numbers, laid out as their ids are
        places = replace(segments, token_ids=torch.arange(segments.tokens, device=input_ids.device)).padded()[0]
    model = language_model(policy)
    inputs: dict[str, Any] = {}
    # A causal policy sees nothing of padding on the right. Without a mask transformers takes its fastest kernels, and
    # no padding token is left with nothing to attend to; other modules get the mask if they have a name for it.
    if model is not None:
        inputs["use_cache"] = False
    elif "attention_mask" in inspect.signature(policy.forward).parameters:
        inputs["attention_mask"] = attention_mask
    limit = length_limit(model)
    if limit is not None and segments.longest > limit:
        if not is_whole(policy):
            raise ValueError(
                f"policy {class_of(model).__name__}: a row has {segments.longest} tokens, and beyond {limit} its "
                "rotary embeddings depend on the row, so that rows are read one by one, and sharded processes must "
                "read as many: shorten the rows (max_length), or use strategy='ddp'"
            )
        rows = (model, input_ids, attention_mask, row, column)
        return _states_row_by_row(*rows, hidden=hidden, noise=noise, places=places)
    real = attention_mask.flatten() != 0
    if model is not None and hidden:
        with _noisy(noise, places):
            output = model.base_model(input_ids=input_ids, **inputs)
        return States(output.last_hidden_state[row, column], tuple(x[real] for x in _router_logits(output)))
    with _noisy(noise, places):
        output = policy(input_ids, **inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or len(logits) != len(input_ids) or logits.shape[1] < input_ids.shape[1]:
        found = type(output).__name__ if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"policy {type(policy).__name__} gave {found} for input_ids of shape {tuple(input_ids.shape)}; "
            "expected logits [batch, time, vocabulary], or an object that has them as .logits"
        )
    virtual = logits.shape[1] - input_ids.shape[1]  # prompt tuning puts tokens of its own in front
    routed = () if virtual else tuple(layer[real] for layer in _router_logits(output))
    return States(logits[row, column + virtual], routed)


def _states_row_by_row(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    row: Tensor,
    column: Tensor,
    *,
    hidden: bool,
    noise: Noise | None,
    places: Tensor | None,
) -> States:
    """The same from rows without neighbours or padding, for models whose numbers depend on the longest row."""
    found, order, routed = [], [], []
    for number, length in enumerate(attention_mask.sum(1).tolist()):
        own = (row == number).nonzero().squeeze(1)
        inputs = {"input_ids": input_ids[number : number + 1, :length], "use_cache": False}
        with _noisy(noise, None if places is None else places[number : number + 1, :length]):
            output = model.base_model(**inputs) if hidden else model(**inputs)
        states = output.last_hidden_state if hidden else output.logits
        found.append(states[0].index_select(0, column[own]))
        order.append(own)
        routed.append(_router_logits(output))
    layers = tuple(torch.cat(parts) for parts in zip(*routed, strict=True))
    return States(torch.cat(found)[torch.cat(order).argsort()], layers)


def _router_logits(output: Any) -> list[Tensor]:
    """Of each layer with experts `[tokens, experts]`, the rows behind each other; none where the output has none."""
    layers = getattr(output, "router_logits", None)
    return [layer.flatten(0, -2) for layer in layers or () if isinstance(layer, Tensor)]


def language_model(policy: nn.Module) -> Any:
    """The transformers model inside the policy; None where there is none, or where it is not called as it is."""
    transformers, peft = sys.modules.get("transformers"), sys.modules.get("peft")
    if transformers is None:  # then no object can be one of its models
        return None
    if peft is not None and isinstance(policy, peft.PeftModel):
        if policy.active_peft_config.is_prompt_learning:
            return None
        policy = policy.get_base_model()
    return policy if isinstance(policy, transformers.PreTrainedModel) else None


def classifies(model: nn.Module) -> bool:
    """Whether a transformers model is a sequence classifier: one head on a whole text, called `score`."""
    return isinstance(getattr(model, "score", None), nn.Module) and model.get_output_embeddings() is None  # type: ignore[operator]


def find_head(model: Any) -> Head | None:
    """The model's head, if it is a plain linear map behind a backbone that can be called on its own."""
    if classifies(model):
        linear = model.score
        if hasattr(linear, "modules_to_save"):  # trained whole beside adapters, and switched off with them
            own = linear.modules_to_save[linear.active_adapters[0]]
            linear = linear.original_module if linear.disable_adapters else own
        return Head(linear) if class_of(linear) is nn.Linear and model.base_model is not model else None
    linear = model.get_output_embeddings()
    rows = trains_rows(linear)
    inside = (linear, linear.original_module) if rows else (linear,)
    if class_of(inside[-1]) is not nn.Linear or model.base_model is model:
        return None
    if any((module._forward_hooks or module._forward_pre_hooks) and not is_sharded(module) for module in inside):
        return None
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(TrainedRows(linear) if rows else linear, scale, getattr(config, "final_logit_softcapping", None))
