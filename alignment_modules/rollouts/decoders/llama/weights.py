"""The weights of a Llama-family model, laid out for decoding."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.added_tokens import trains_rows
from alignment_modules.policies.sharded import class_of, is_sharded, is_whole

_FAMILY = {
    "transformers.models.llama.modeling_llama": "LlamaForCausalLM",
    "transformers.models.mistral.modeling_mistral": "MistralForCausalLM",
    "transformers.models.qwen2.modeling_qwen2": "Qwen2ForCausalLM",
    "transformers.models.qwen3.modeling_qwen3": "Qwen3ForCausalLM",
}
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}  # the others depend on the sequence's length
_LORA_LINEAR = "peft.tuners.lora.layer"


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Norm weights and the attention's scale are folded into the matrices that follow them.

    The rows of queries and keys are reordered so that the two numbers that rotary embeddings turn together are
    neighbours, a complex number; their dot products do not change.

    Attributes:
        qkv: `[(query + 2 * key/value heads) * head_dim, hidden]`.
        qkv_bias: `[(query + 2 * key/value heads) * head_dim]`, or None.
        qk_norm: `[query + key heads, head_dim]` weight of the norm on queries and keys, or None.
        output: `[query heads * head_dim, hidden]`, transposed.
        gate_up: `[2 * intermediate, hidden]`.
        down: `[hidden, intermediate]`.
        epsilons: Of the norms before attention, on queries and keys, and before the feed-forward part.
    """

    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    output: Tensor
    gate_up: Tensor
    down: Tensor
    epsilons: tuple[float, float, float]


@dataclass(frozen=True)
class LlamaWeights:
    """A whole model.

    Attributes:
        embedding: `[vocabulary, hidden]`, the model's own tensor, unless rows of it are trained beside it.
        layers: Decoder layers.
        norm: `[hidden]` weight of the last norm.
        epsilon: Of the last norm.
        head: The same of the head.
        head_bias: `[vocabulary]`, or None.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Size of a head.
        rotary: The model's rotary embedding module.
    """

    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    epsilon: float
    head: Tensor
    head_bias: Tensor | None
    heads: int
    kv_heads: int
    head_dim: int
    rotary: nn.Module

    def rotations(self, length: int) -> Tensor:
        """`[length, head_dim / 2]` complex: what a query or key at each position is multiplied by."""
        positions = torch.arange(length, device=self.embedding.device)[None]
        cos, sin = self.rotary(self.embedding[:1, None], positions)
        half = self.head_dim // 2
        return torch.complex(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())


def no_fast_decoding(policy: nn.Module) -> str | None:
    """Why a policy is not a plain Llama-family model that :class:`LlamaWeights` describes; None if it is one.

    Every submodule must be of a known class without hooks or replaced forwards, so that the arithmetic is known.
    """
    if "transformers" not in sys.modules:
        return "not a transformers model"
    model = _unwrapped(policy)
    kind = class_of(model)
    if _FAMILY.get(kind.__module__) != kind.__name__:
        return f"{kind.__name__} is not of the Llama family"
    if not is_whole(policy):
        return "its weights lie in shards"
    for module in (policy, *model.modules()):
        gathers = int(is_sharded(module))  # one hook before its forward pass and one after, which are not needed here
        hooks = max(len(module._forward_hooks), len(module._forward_pre_hooks))
        if hooks > gathers or "forward" in module.__dict__:
            return f"{type(module).__name__} has a hook or a replaced forward"
    for module in model.modules():
        if not _known(module, kind.__module__):
            return f"{type(module).__name__} inside {kind.__name__} is of an unknown kind"
    return _unsupported_settings(model) or _unsupported_tensors(model)


def read_weights(policy: nn.Module) -> LlamaWeights:
    """Copies the live weights into their decoding layout (embedding and head only where rows of theirs are trained).

    LoRA adapters that are on are merged into the copies.

    Args:
        policy: A policy for which :func:`no_fast_decoding` gives None.
    """
    model: Any = _unwrapped(policy)
    config, body = model.config, model.model
    attention = body.layers[0].self_attn
    sizes = (config.num_attention_heads, config.num_key_value_heads, attention.head_dim)
    return LlamaWeights(
        embedding=_weight(body.embed_tokens),
        layers=[_read_layer(layer, *sizes) for layer in body.layers[: config.num_hidden_layers]],
        norm=body.norm.weight,
        epsilon=body.norm.variance_epsilon,
        head=_weight(model.lm_head),
        head_bias=None if trains_rows(model.lm_head) else model.lm_head.bias,
        heads=sizes[0],
        kv_heads=sizes[1],
        head_dim=sizes[2],
        rotary=body.rotary_emb,
    )


def _read_layer(layer: Any, heads: int, kv_heads: int, head_dim: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    # Position 2i holds what was i, position 2i + 1 what was i + head_dim / 2.
    within = torch.arange(head_dim).view(2, -1).t().flatten()
    order = (torch.arange(heads + kv_heads)[:, None] * head_dim + within).flatten()
    order = torch.cat((order, torch.arange(len(order), len(order) + kv_heads * head_dim))).to(
        attention.q_proj.weight.device
    )
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    qkv = torch.cat([_weight(projection) for projection in projections])
    bias = None
    if projections[0].bias is not None:
        bias = torch.cat([projection.bias for projection in projections])
    qk_norm, qk_epsilon = None, 0.0
    if hasattr(attention, "q_norm"):
        qk_norm = torch.cat(
            (
                attention.q_norm.weight.expand(heads, -1) * attention.scaling,
                attention.k_norm.weight.expand(kv_heads, -1),
            )
        )[:, within]
        qk_epsilon = attention.q_norm.variance_epsilon
    else:
        qkv[: heads * head_dim] *= attention.scaling
        if bias is not None:
            bias[: heads * head_dim] *= attention.scaling
    return Layer(
        qkv=qkv[order].mul_(layer.input_layernorm.weight),
        qkv_bias=None if bias is None else bias[order],
        qk_norm=qk_norm,
        output=_weight(attention.o_proj).t(),
        gate_up=torch.cat((_weight(mlp.gate_proj), _weight(mlp.up_proj))).mul_(layer.post_attention_layernorm.weight),
        down=_weight(mlp.down_proj),
        epsilons=(layer.input_layernorm.variance_epsilon, qk_epsilon, layer.post_attention_layernorm.variance_epsilon),
    )


def _unwrapped(policy: nn.Module) -> nn.Module:
    """The transformers model inside a LoRA-only peft model; other policies as they are."""
    configs = getattr(policy, "peft_config", None)
    if configs is None or not hasattr(policy, "get_base_model"):
        return policy
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()}
    return policy.get_base_model() if kinds == {"LORA"} else policy  # type: ignore[operator]


def _known(module: nn.Module, modeling: str) -> bool:
    kind = class_of(module)
    if kind in (nn.Linear, nn.Embedding, nn.ModuleList, nn.ModuleDict, nn.ParameterDict, nn.Identity, nn.Dropout):
        return True
    if kind.__module__ == modeling or kind is nn.SiLU:
        return True
    if kind.__module__ == "transformers.activations" and kind.__name__ == "SiLUActivation":
        return True
    if kind.__module__ == _LORA_LINEAR and kind.__name__ == "Linear":
        return _mergeable(module)
    if kind.__module__ == "peft.tuners.lora.dora" and kind.__name__ == "DoraLinearLayer":
        return True
    if trains_rows(module) or kind.__name__ == "TrainableTokensLayer":
        return True
    return kind.__module__.startswith("peft.tuners") and kind.__name__ == "BufferDict"


def _mergeable(layer: Any) -> bool:
    """Whether a LoRA layer is `base + scaling * B A`, with each output scaled where it is DoRA, and nothing else."""
    if type(layer.base_layer) is not nn.Linear or (layer.disable_adapters and layer.merged):
        return False
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in active:
        dropout = layer.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            return False
        variant = layer.lora_variant.get(name)
        if variant is not None and (len(active) > 1 or type(variant).__name__ != "DoraLinearVariant"):
            return False
        if layer.lora_B[name].bias is not None:
            return False
    return True


def _weight(linear: Any) -> Tensor:
    """A linear layer's weight with its active LoRA adapters merged."""
    if type(linear) in (nn.Linear, nn.Embedding) or trains_rows(linear):
        return linear.weight
    weight: Tensor = linear.base_layer.weight
    if linear.disable_adapters or linear.merged:
        return weight
    for name in linear.active_adapters:
        if name not in linear.lora_A:
            continue
        update = linear.get_delta_weight(name).to(weight.dtype)
        if name in linear.lora_magnitude_vector:
            magnitude = linear.lora_magnitude_vector[name]
            scale = magnitude.weight / magnitude.get_weight_norm(weight, update, scaling=1)
            weight = scale.view(-1, 1) * (weight + update)
        else:
            weight = weight + update
    return weight


def _unsupported_settings(model: Any) -> str | None:
    config, layers = model.config, model.model.layers
    if getattr(config, "hidden_act", None) != "silu":
        return f"hidden_act is {config.hidden_act!r}"
    kinds = getattr(config, "layer_types", None)
    if any(kind != "full_attention" for kind in kinds or ()):
        return f"layer_types are {kinds}"
    if kinds is None and getattr(config, "sliding_window", None) is not None:
        return f"sliding_window is {config.sliding_window}"
    rotary = model.model.rotary_emb
    if rotary.rope_type not in _FIXED_ROPE:
        return f"rope_type is {rotary.rope_type!r}"
    attention = layers[0].self_attn
    if rotary.inv_freq.numel() * 2 != attention.head_dim:
        return f"rotary embeddings turn {rotary.inv_freq.numel() * 2} of {attention.head_dim} dimensions"
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        if attention.training and attention.attention_dropout > 0:
            return f"attention_dropout is {attention.attention_dropout} in train mode"
        if any(linear.bias is not None for linear in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
            return "its output or feed-forward projections have biases"
    if type(model.lm_head) is not nn.Linear and not trains_rows(model.lm_head):
        return f"its head is a {type(model.lm_head).__name__}"
    return None


def _unsupported_tensors(model: nn.Module) -> str | None:
    parameters = list(model.parameters())
    if any(type(parameter) not in (nn.Parameter, Tensor) for parameter in parameters):
        return "its weights are not plain tensors"
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) != 1:
        return f"its weights are of {len(kinds)} float types and devices"
    dtype, device = next(iter(kinds))
    if dtype not in (torch.float32, torch.float64):
        return f"its weights are {dtype}"
    if torch.is_autocast_enabled(device.type):
        return "it runs under autocast"
    return None
