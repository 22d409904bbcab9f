"""Adapters that start from a part of the base's weights: PiSSA and OLoRA.

Both start `A` and `B` at factors `A0` and `B0` of a part of the weight `W`, and train them on top of what is left,
`W - s B0 A0`. Here the base keeps its weights, and a second, frozen adapter takes the start away instead:

    W x + s B A x - s B0 A0 x

which is the same function with the same gradients. So the policy starts as its base, with the adapters off it is its
base exactly, no weight of the base is rounded, and the adapter that is saved is one of plain LoRA, of twice the rank.

`peft` computes the factors.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignment_modules.policies.adapters import START, lora_layers


def starts_from_base(init: str) -> bool:
    """Whether an initialisation takes its adapters from the base's weights."""
    return init.startswith(("pissa", "olora"))


def start_from_base(model: Any, init: str) -> None:
    """Sets fresh adapters to a part of their base's weights, and adds the frozen adapter that takes it away.

    Args:
        model: A `peft.PeftModel` with one adapter, fresh, of plain LoRA; changed in place.
        init: "pissa" (principal singular vectors, Meng et al. 2024, https://arxiv.org/abs/2404.02948),
            "pissa_niter_N" (the same by N steps of a randomised decomposition, from the global torch seed) or "olora"
            (of a QR decomposition, Büyükakyüz 2024, https://arxiv.org/abs/2406.01775).

    Raises:
        ValueError: A layer is of another kind than a linear one, or smaller than the rank.
    """
    name = model.active_adapter
    for path, layer in lora_layers(model):
        _check_layer(path, layer, name, init)
    config = copy.deepcopy(model.peft_config[name])
    config.modules_to_save = config.trainable_token_indices = None
    model.add_adapter(START, config)
    for _, layer in lora_layers(model):
        if not layer.get_base_layer().weight.is_meta:
            _factorise(layer, name, init)
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, START: ("lora_A", "lora_B")}
        layer.set_adapter([name, START])


def _check_layer(path: str, layer: Any, name: str, init: str) -> None:
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or (init == "olora" and layer.fan_in_fan_out):
        raise ValueError(
            f"lora.init={init!r} is for linear layers, and {path!r} is a {type(layer.get_base_layer()).__name__}: "
            "leave it out of lora.target_modules, or use lora.init='kaiming'"
        )
    rank, largest = layer.r[name], min(layer.in_features, layer.out_features)
    if rank > largest:
        raise ValueError(
            f"lora.r={rank} with lora.init={init!r}: {path!r} has the weight {layer.out_features} x "
            f"{layer.in_features}, of rank {largest} at most; use at most that, or lora.init='kaiming'"
        )


def _factorise(layer: Any, name: str, init: str) -> None:
    base = layer.get_base_layer()
    weight, dtype = base.weight.data, layer.lora_A[name].weight.dtype
    base.weight.data = weight.to(torch.float32, copy=True)  # into which peft writes what is left
    try:
        with torch.no_grad():
            layer.olora_init(name) if init == "olora" else layer.pissa_init(name, init)
    finally:
        base.weight.data = weight
    for factors, sign in ((layer.lora_A, 1), (layer.lora_B, -1)):
        start = factors[name].weight.data.to(dtype).contiguous()
        factors[name].weight.data = start
        factors[START].weight.data = -start if sign < 0 else start.clone()


def has_start(policy: nn.Module) -> bool:
    """Whether a policy's adapters started from a part of its base's weights."""
    return START in getattr(policy, "peft_config", {})


def is_of_start(name: str) -> bool:
    """Whether a parameter of that name is of an adapter that takes a start away, which no file holds."""
    return f".{START}." in name and ".lora_" in name


def save_as_lora(policy: Any, folder: Path) -> None:
    """Makes what `peft` saved of a trained adapter one of plain LoRA on the base as it is.

    `[B, -B0] [A; A0]`, of twice the rank, with the same scale.

    Args:
        policy: The policy, for which `has_start` holds.
        folder: What `peft` wrote of its trained adapter; changed.
    """
    import peft
    from safetensors.torch import load_file, save_file

    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    trained, start = load_file(file), peft.get_peft_model_state_dict(policy, adapter_name=START)
    joined = {}
    for key, value in trained.items():
        if key not in start:
            joined[key] = value
            continue
        parts = [value, start[key].detach().to(value)]
        joined[key] = torch.cat(parts, dim=0 if ".lora_A." in key else 1).contiguous()
    save_file(joined, file, metadata={"format": "pt"})
    options = json.loads(config.read_text(encoding="utf-8"))
    options["r"] *= 2
    options["lora_alpha"] *= 2**0.5 if options["use_rslora"] else 2
    config.write_text(json.dumps(options, indent=2, sort_keys=True) + "\n", encoding="utf-8")
