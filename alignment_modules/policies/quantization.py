"""Frozen weights in 8 or 4 bits: how they are loaded, which layers hold them, and what they stand for.

A quantized layer computes with the numbers that its few bits stand for, so that is the base an adapter is trained on
(QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). `bitsandbytes`, `torchao` and `transformers` are
imported when something is quantized, never by importing this module.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

Quantization = Literal["4bit", "8bit", "int8_weight_only"]
PACKAGES: dict[str, dict[str, str]] = {
    "4bit": {"bitsandbytes": "0.46.1"},
    "8bit": {"bitsandbytes": "0.46.1"},
    "int8_weight_only": {"torchao": "0.18", "peft": "0.21"},  # earlier ones have another kind of int8 tensor
}
"""What each needs, and from which version on."""
_KINDS = {"Params4bit": "4bit", "Int8Params": "8bit", "Int8Tensor": "int8_weight_only"}
# One byte of scale for 64 weights, and for 256 of those a float32.
_BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0, "int8_weight_only": 1.0}


def check_kind(name: str) -> None:
    """Refuses by name what adapters cannot be trained on.

    Args:
        name: `PolicyConfig.quantization`.

    Raises:
        ValueError: It is not one of `Quantization`.
    """
    if name not in PACKAGES:
        why = ": of torchao's kinds adapters are trained on int8 weights alone" if name.endswith("_weight_only") else ""
        raise ValueError(f"policy.quantization={name!r} is not allowed{why}. Allowed are {list(PACKAGES)}.")


def check_packages(name: str) -> None:
    """Refuses a kind of quantization whose package is missing or too old.

    Args:
        name: One of `Quantization`.

    Raises:
        ImportError: What it needs is not installed, or too old.
    """
    for package, least in PACKAGES[name].items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"policy.quantization={name!r} needs the package {package}: pip install '{package}>={least}'."
            )
        found = importlib.metadata.version(package)
        if _numbers(found) < _numbers(least):
            raise ImportError(
                f"policy.quantization={name!r} needs {package}>={least}, and {found} is installed: "
                f"pip install --upgrade '{package}>={least}'."
            )


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, such as (0, 46, 1)."""
    parts = []
    for part in version.partition("+")[0].split(".")[:3]:
        digits = "".join(character for character in part if character.isdigit())
        parts.append(int(digits or 0))
    return (*parts, *[0] * (3 - len(parts)))


def check_stored(config: dict[str, Any], path: str, quantization: str | None, *, frozen: bool) -> None:
    """Refuses to quantize, or to train whole, a folder whose weights are quantized as they are stored.

    Args:
        config: What its config.json says.
        path: The folder or hub id, for the message.
        quantization: `PolicyConfig.quantization`.
        frozen: Whether its weights stay as they are: a base under `lora`, or a model that is not trained.

    Raises:
        ValueError: If it is quantized, and is to be quantized or trained.
    """
    stored = config.get("quantization_config")
    if not stored:
        return
    method = stored.get("quant_method", "a method without a name")
    if quantization is not None:
        raise ValueError(
            f"policy.quantization={quantization!r}: the weights of {path!r} are stored quantized ({method}); leave "
            "'quantization' out, or give the folder of the full-precision model."
        )
    if not frozen:
        raise ValueError(
            f"policy.path={path!r}: its weights are stored quantized ({method}) and cannot be trained themselves; "
            "policy.lora trains adapters on them."
        )


def loading_options(name: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Keywords of `from_pretrained` that quantize the linear layers, all but the head, while they are read.

    Args:
        name: One of `Quantization`.
        dtype: In which 4-bit layers compute; None: bfloat16.
    """
    import transformers

    # On the CPU like any other model: the Trainer moves it to the device that it finds for its process.
    options: dict[str, Any] = {"device_map": {"": "cpu"}}
    if name == "int8_weight_only":
        from torchao.quantization import Int8WeightOnlyConfig

        kind = Int8WeightOnlyConfig(set_inductor_config=False)  # or it would change settings of the whole process
        return {"quantization_config": transformers.TorchAoConfig(kind)}
    if name == "8bit":
        return options | {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)}
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )
    return options | {"quantization_config": config}


def settle(model: nn.Module) -> None:
    """Makes the layers of a model that was read with `loading_options` fit to be trained through, moved and copied.

    Args:
        model: The model; changed.
    """
    for _, layer in quantized_layers(model):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # In eval mode it would repack its weights for a bfloat16 kernel that lets no gradient through.
            layer.support_avx512bf16_for_cpu = False
        if _kind(layer.weight) == "8bit":
            layer.register_forward_pre_hook(_hold_scales)
            logging.getLogger("bitsandbytes.autograd._functions").addFilter(_once)


def _hold_scales(layer: Any, _: Any) -> None:
    """Puts weights and scales where the layer looks for them: a move or a copy takes the weights alone along."""
    weight, state = layer.weight, layer.state
    scales = state.SCB if weight.SCB is None else weight.SCB
    state.CB, state.SCB = weight.data, scales.to(weight.device)
    weight.CB = weight.SCB = None


_said: set[str] = set()


def _once(record: logging.LogRecord) -> bool:
    """Lets a message through the first time: the cast of an 8-bit layer's inputs is told at each of its calls."""
    message = record.getMessage()
    if message in _said:
        return False
    _said.add(message)
    return True


def _kind(weight: Any) -> str | None:
    """Which of `Quantization` a weight is in; None: in none of them."""
    return _KINDS.get(type(weight).__name__)


def quantized_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """Lists (name, layer) of the linear layers within a module whose weight is in one of `Quantization`."""
    found = []
    for name, layer in module.named_modules():
        weight = dict(layer.named_parameters(recurse=False)).get("weight")
        if weight is not None and _kind(weight) is not None:
            found.append((name, layer))
    return found


def check_can_be_sent(module: nn.Module) -> None:
    """Refuses torchao's weights on several processes, which torch's DDP makes alike by sending them when it starts.

    Args:
        module: A training module.

    Raises:
        ValueError: If one of its models has some; the message names it.
    """
    found = [name for name, layer in quantized_layers(module) if _kind(layer.weight) == "int8_weight_only"]
    if found:
        raise ValueError(
            f"{found[0].partition('.')[0]}.quantization='int8_weight_only' on several processes is not possible: "
            "torchao's weights cannot be sent to other processes, as DDP does when it starts. Use '8bit' or '4bit'."
        )


def quantized_entries(module: nn.Module, state: Any) -> set[str]:
    """The keys of a state dictionary that hold quantized weights or their scales.

    Args:
        module: Whose state dictionary it is.
        state: The dictionary, or its keys.
    """
    layers = {name for name, _ in quantized_layers(module)}
    found = set()
    for key in state if layers else ():
        for name in _parents(key):
            if name in layers and key != f"{name}.bias":
                found.add(key)
    return found


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def dequantized(layer: Any, dtype: torch.dtype) -> nn.Linear:
    """A plain linear layer with the weights that a quantized one stands for.

    Args:
        layer: One of `quantized_layers`; left as it is.
        dtype: Of the new layer.
    """
    weight, kind = layer.weight, _kind(layer.weight)
    if kind == "4bit":
        import bitsandbytes

        values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    elif kind == "8bit":
        import bitsandbytes

        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        values = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    else:
        values = weight.dequantize()
    bias = getattr(layer, "bias", None)
    with torch.device("meta"):
        plain = nn.Linear(values.shape[1], values.shape[0], bias=bias is not None, dtype=dtype)
    plain.weight = nn.Parameter(values.detach().to(dtype), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    return plain.train(layer.training)


def _dequantize_inside(module: nn.Module) -> nn.Module:
    """Puts plain float32 layers in the place of those that are quantized within a module."""
    for name, layer in quantized_layers(module):
        module.set_submodule(name, dequantized(layer, torch.float32))
    return module


def _as_stored(plain: nn.Linear, layer: Any) -> nn.Linear:
    """With its weight as the folder of its model has it: that of GPT-2's layers lies on its side."""
    if getattr(getattr(layer, "source_cls", None), "__name__", "") == "Conv1D":
        plain.weight = nn.Parameter(plain.weight.t().contiguous(), requires_grad=False)
    return plain


def plain_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's state dictionary with what its quantized layers stand for in their place.

    Args:
        model: Any module; left as it is.
        dtype: Of the weights that were quantized.
    """
    state = model.state_dict()
    for key in quantized_entries(model, state):
        del state[key]
    for name, layer in quantized_layers(model):
        state[f"{name}.weight"] = _as_stored(dequantized(layer, dtype), layer).weight.data
    return state


def effective_layer(layer: Any, dtype: torch.dtype) -> nn.Linear:
    """The plain linear layer that computes what an adapted quantized one computes, whatever the kind of adapter.

    Args:
        layer: A linear layer of `peft` around a quantized one; left as it is.
        dtype: Of the result.

    Raises:
        ValueError: A weight is not finite.
    """
    twin: Any = _dequantize_inside(copy.deepcopy(layer)).float().eval()
    plain: nn.Linear = twin.get_base_layer()
    with torch.no_grad(), torch.autocast(plain.weight.device.type, enabled=False):
        bias = 0.0 if plain.bias is None else plain.bias
        columns = twin(torch.eye(plain.in_features, device=plain.weight.device)) - bias
    if not torch.isfinite(columns).all():
        raise ValueError("NaNs detected in the merged weights")
    plain.weight = nn.Parameter(columns.t().contiguous(), requires_grad=False)
    return _as_stored(plain.to(dtype), layer.get_base_layer())


def plain_shell(model: Any, state: dict[str, Tensor]) -> Any:
    """A model of the same class without quantization, that holds a state dictionary of full-precision weights.

    Args:
        model: A transformers model with quantized layers.
        state: All of its weights under its own names; they are held, not copied.
    """
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        shell = type(model)(config)
    shell.load_state_dict(state, assign=True)
    shell.tie_weights()
    for name, buffer in list(shell.named_buffers()):
        if buffer.is_meta:  # one that no state dictionary holds, such as the frequencies of rotary embeddings
            owner, _, leaf = name.rpartition(".")
            setattr(shell.get_submodule(owner), leaf, model.get_buffer(name).clone())
    shell.name_or_path = config.name_or_path
    if getattr(model, "generation_config", None) is not None:
        shell.generation_config = copy.deepcopy(model.generation_config)
    return shell


_MARKS = ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit", "quantization_method", "hf_quantizer")


def carry_marks(model: Any, other: Any) -> None:
    """Tells a model that took over another's quantized layers what `peft` and `transformers` look for."""
    for name in _MARKS:
        if hasattr(model, name):
            setattr(other, name, getattr(model, name))


def stored_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or what a quantized one of torchao holds."""
    if _kind(tensor) != "int8_weight_only":
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [getattr(tensor, name) for name in names]


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of a weight, also of one whose numbers are packed."""
    state = getattr(weight, "quant_state", None)
    return weight.shape if state is None else torch.Size(state.shape)


def count(parameter: Tensor) -> int:
    """How many numbers a parameter holds, also where they are packed."""
    return prod(shape_of(parameter))


def mark_shapes(model: nn.Module, name: str) -> None:
    """Notes on a model without weights how many bytes each layer would take that `loading_options` quantizes.

    Args:
        model: Of transformers, on the meta device.
        name: One of `Quantization`.
    """
    whole = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}  # type: ignore[operator]
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and id(layer) not in whole:
            layer.weight.packed_bytes = round(layer.weight.numel() * _BYTES[name])  # type: ignore[attr-defined]


def carry_shapes(model: nn.Module, twin: nn.Module) -> None:
    """Notes on the copy of a model what `mark_shapes` noted on that: copies of a parameter lose it.

    Args:
        model: The original, whose layers may have adapters.
        twin: Its copy without adapters.
    """
    own = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        if (noted := getattr(own.get(name), "packed_bytes", None)) is not None:
            parameter.packed_bytes = noted  # type: ignore[attr-defined]


def bytes_of(tensor: Any) -> int:
    """Bytes that a tensor takes; of one that `mark_shapes` marked those that it would take."""
    marked = getattr(tensor, "packed_bytes", None)
    return sum(part.numel() * part.element_size() for part in stored_parts(tensor)) if marked is None else marked
