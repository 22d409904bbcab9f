"""Gradient checkpointing: activations that are computed again in the backward pass, in all layers, some, or in part."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from alignment_modules.functional.ranges import MAX_INT, Range

Recomputed = bool | Literal["selective"] | Annotated[int, Range(2, MAX_INT)]
"""Which activations are computed again: of all layers, all but products and attention of all layers, or of each n-th
layer."""

_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
)


def enable_checkpointing(model: nn.Module, how: Recomputed) -> None:
    """Switches a model's own gradient checkpointing on; gradients stay what they were.

    Args:
        model: A model of transformers, still without adapters.
        how: True recomputes each layer, "selective" all of each layer but its matrix products and its attention, whose
            results are kept, a number each n-th layer, the first among them.

    Raises:
        ValueError: If the model has no such switch, or no layers that it could be set for one by one.
    """
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    try:
        if enable is None:
            raise ValueError("it has no switch for it")
        enable(options)
        if how is not True:
            _choose_layers(model, how)
    except ValueError as error:
        raise ValueError(
            f"policy.gradient_checkpointing={how!r}: {type(model).__name__} does not support it ({error})."
        ) from error
    free_embedding_output(model)


def free_embedding_output(model: nn.Module) -> None:
    """Undoes what transformers and peft do for reentrant checkpointing, which alone needs that gradient."""
    disable: Any = getattr(model, "disable_input_require_grads", None)
    if disable is not None:
        disable()


def _choose_layers(model: nn.Module, how: int | str) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError("it has no layers that recompute themselves one by one; True is allowed")
    if how == "selective":
        return
    if int(how) > len(layers):
        raise ValueError(f"it has {len(layers)} layers")
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % int(how) == 0


def _keep_products(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What is dear to compute again is kept."""
    kept = operator in _PRODUCTS or "scaled_dot_product" in str(operator)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
