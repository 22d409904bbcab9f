"""The modes in which a policy is read and trained: evaluation mode borrowed for a while, and dropout off."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards, also after an exception, every submodule has its own mode again.

    The flags are set directly: a module may override `train` to keep parts of it in one mode for ever.

    Args:
        module: Any module.
    """
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True


@contextmanager
def reading_mode(module: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and no gradients inside the block, which gets the module.

    Args:
        module: Any module.
    """
    with eval_mode(module), torch.no_grad():
        yield module


def disable_dropout(policy: nn.Module) -> None:
    """Makes log-probabilities a function of weights and tokens alone (eval mode), and keeps the policy trainable.

    transformers checkpoints a layer's activations only while that layer is in training mode. Such layers keep their
    own flag (their submodules do not), and drop it while they compute, since some read it for a dropout of their own.
    Call it again after `policy.train()`.

    Args:
        policy: Any module; gradients flow as before.
    """
    policy.eval()
    layers = _checkpointed(policy)
    for layer in layers:
        run = layer._gradient_checkpointing_func
        if not (isinstance(run, functools.partial) and run.func is _checkpoint_in_eval):
            layer._gradient_checkpointing_func = functools.partial(_checkpoint_in_eval, layer, run)
            layer.register_forward_pre_hook(_enter_without_gradients)
            layer.register_forward_hook(_leave, always_call=True)
        layer.training = True


def _checkpointed(policy: nn.Module) -> list[Any]:
    """Lists the modules that recompute themselves.

    These are transformers' layers, or, in models with code of their own, whatever carries the switch.
    """
    flagged = [
        m
        for m in policy.modules()
        if getattr(m, "gradient_checkpointing", False) and hasattr(m, "_gradient_checkpointing_func")
    ]
    if not flagged or "transformers" not in sys.modules:
        return []
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in flagged if isinstance(m, GradientCheckpointingLayer)] or flagged


def _checkpoint_in_eval(
    layer: nn.Module, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if _in_training(layer):
        return checkpoint(function, *args, **kwargs)

    def in_eval(*inputs: Any, **options: Any) -> Any:
        layer.training = False
        try:
            return function(*inputs, **options)
        finally:
            layer.training = True

    return checkpoint(in_eval, *args, **kwargs)


def _in_training(layer: nn.Module) -> bool:
    """Whether the policy is back in training mode as a whole, so that the layer's flag means what it says."""
    return any(child.training for child in layer.children())


def _enter_without_gradients(layer: nn.Module, _: Any) -> None:
    if layer.training and not torch.is_grad_enabled() and not _in_training(layer):  # nothing will be checkpointed
        layer.training, layer._resume_training = False, True  # type: ignore[assignment]


def _leave(layer: nn.Module, _: Any, __: Any) -> None:
    if layer.__dict__.pop("_resume_training", False):
        layer.training = True
