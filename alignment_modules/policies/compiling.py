"""`torch.compile` of a policy's layers, each in place, and the passes that run without it.

A layer is compiled in two pieces, before and behind its attention: how segments lie in a row changes from batch to
batch, so attention over them stays out of graphs. Sizes are dynamic, so that one graph serves rows of all lengths, and
layers of one kind share their graphs.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from alignment_modules.policies.forward import language_model
from alignment_modules.policies.last_layer import find_feed_forward
from alignment_modules.policies.layers import decoder_layers

# How many graphs one piece of code may have, in torch 8: policy, reference, critic and teachers share their layers'
# code, and each is read with and without gradients, with and without adapters.
_VARIANTS = 64
# What runs a layer that is recomputed; empty in a process that got its policy pickled, which is then not compiled.
_COMPILED: dict[str, Callable[..., Any]] = {}


def compile_layers(policy: nn.Module) -> None:
    """Compiles each layer of a policy in place: names, state dictionaries and copies stay what they were.

    Args:
        policy: A model of transformers, also with peft adapters, whose gradient checkpointing is already chosen.

    Raises:
        ValueError: If it has no layers that can be found, or there is no C++ compiler.
    """
    layers = _compilable(policy)
    if not layers:
        raise ValueError(f"policy.compile=True: {type(policy).__name__} has no layers that can be compiled one by one")
    check_compiler()
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, _VARIANTS)
    _COMPILED["call"] = torch.compile(_call, dynamic=True)
    for layer in layers:
        layer.compile(dynamic=True)
        run: Any = getattr(layer, "_gradient_checkpointing_func", None)
        if run is not None:  # torch runs what it recomputes without the graphs around it
            layer._gradient_checkpointing_func = functools.partial(_checkpoint_compiled, run)  # type: ignore[assignment]


def compile_as(policy: nn.Module, copy: nn.Module) -> nn.Module:
    """Compiles a copy of a policy, which copying leaves out, where the policy is compiled; returns the copy."""
    for layer in _compilable(copy) if is_compiled(policy) else []:
        layer.compile(dynamic=True)
    return copy


def _compilable(policy: nn.Module) -> list[nn.Module]:
    """All layers but the last, where that one may leave out its feed-forward block (`feed_forward_on`)."""
    model = language_model(policy)
    layers = decoder_layers(model)
    return layers[:-1] if len(layers) > 1 and find_feed_forward(model) is not None else layers


def is_compiled(module: nn.Module) -> bool:
    """Whether some part of a module is compiled in place."""
    return any(child._compiled_call_impl is not None for child in module.modules())


def without_graphs(policy: nn.Module) -> AbstractContextManager[Any]:
    """Runs a block in which what is compiled is computed as if it were not: with a cache that grows, or once.

    Args:
        policy: Nothing happens where no part of it is compiled.
    """
    return torch.compiler.set_stance("force_eager") if is_compiled(policy) else nullcontext()


def check_compiler() -> None:
    """Checks that the C++ compiler that torch will call is there.

    Raises:
        ValueError: If it is not; the message names it.
    """
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"policy.compile=True needs a C++ compiler, and {compiler!r} is not there: install it, name another in the "
            "environment variable CXX, or leave policy.compile out"
        )


def _checkpoint_compiled(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **more: Any) -> Any:
    return checkpoint(_COMPILED.get("call", _call), function, *args, **more)


def _call(function: Callable[..., Any], *args: Any, **more: Any) -> Any:
    return function(*args, **more)
