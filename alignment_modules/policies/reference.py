"""Frozen references: what the policy is compared with, and the modes in which both are compared."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.config import DTYPES, PolicyConfig
from alignment_modules.policies.load import build_policy
from alignment_modules.policies.lora import adapter_is_identity, adapter_off, has_adapter
from alignment_modules.policies.modes import eval_mode


def build_reference(reference: str | PolicyConfig | nn.Module | None, policy: nn.Module) -> nn.Module | None:
    """Gives the frozen model that a policy is held against.

    Call it before the first step, and before a checkpoint is restored into the policy.

    Args:
        reference: A folder or hub id (loaded in the policy's dtype), a configuration, or a module of yours, which is
            frozen *in place* (eval mode, no gradients). None is the policy as it stands: a deep copy that shares
            nothing with it, or, where the policy carries fresh adapters on a frozen base, nothing at all, since
            switching them off gives the same model. An adapter that was trained before is not switched off but copied
            with its model.
        policy: The policy, built.

    Returns:
        The reference in eval mode, no parameter of it requiring a gradient; or None where it is the policy with its
        adapters off.

    Raises:
        ValueError: The reference is the policy itself or shares a weight with it, or cannot be built.
        ImportError: A quantized reference without bitsandbytes.
    """
    if reference is None:
        if has_adapter(policy) and adapter_is_identity(policy):
            return None
        return _freeze(copy.deepcopy(policy))
    if isinstance(reference, (str, os.PathLike)):
        names: dict[torch.dtype | None, str] = {dtype: name for name, dtype in DTYPES.items()}
        reference = PolicyConfig(path=os.fspath(reference), dtype=names.get(_dtype(policy), "float32"))
    try:
        module = build_policy(reference, trainable=False)
    except (ValueError, ImportError) as error:
        raise type(error)(_about_the_reference(str(error))) from error
    ours = {id(parameter) for parameter in policy.parameters()}
    shared = [name for name, parameter in module.named_parameters() if id(parameter) in ours]
    if module is policy or shared:
        raise ValueError(
            f"reference shares {shared[0] if shared else 'everything'!r} with the policy, so that freezing it would "
            "freeze the policy. "
            "Give another module, or leave reference out for a frozen copy of the policy."
        )
    return _freeze(module)


def _about_the_reference(message: str) -> str:
    """What `build_policy` said, with the options called by the name that the reference has."""
    named = re.sub(r"(?<![\w'/])policy(?=[.=][a-z_']+)", "reference", message)
    return named if "reference" in named else f"reference: {named}"


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _freeze(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return module.eval()


@contextmanager
def reference_mode(policy: nn.Module, reference: nn.Module | None) -> Iterator[nn.Module]:
    """Runs a block that scores with the reference, without gradients and in eval mode.

    Where the reference is the policy without its adapters, they are off within the block.

    Args:
        policy: The policy.
        reference: What `build_reference` gave.

    Yields:
        The module to score with. On leaving, also by an exception, every submodule's training flag and every
        parameter's `requires_grad` are as they were.

    Raises:
        ValueError: `reference` is None and the policy has no adapters to switch off.
    """
    module = policy if reference is None else reference
    if reference is None and not has_adapter(policy):
        raise ValueError(
            "reference=None stands for the policy with its adapters off, but the policy has none; use build_reference."
        )
    switch = adapter_off(policy) if reference is None else nullcontext()
    with eval_mode(module), torch.no_grad(), switch:
        yield module


def weights_mark(policy: nn.Module, reference: nn.Module | None) -> bytes:
    """A cheap mark of a reference's weights as they stand: another one where they were changed or replaced.

    Made of each tensor's address and version counter, and, since a write to `.data` counts no version, of a sample of
    its values. For comparing a module with itself; `fingerprint` compares two.

    Args:
        policy: The policy.
        reference: What `build_reference` gave; None stands for the policy's frozen part.
    """
    tensors: list[Any] = [parameter for parameter in policy.parameters() if not parameter.requires_grad]
    if reference is not None:
        tensors = [*reference.parameters(), *reference.buffers()]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in local]
    floats = [t.detach() for t in local if t.is_floating_point() and t.numel()]
    parts = [t.reshape(-1)[:: max(1, t.numel() // 32)].float() for t in floats[:: max(1, len(floats) // 8)]]
    sample = torch.cat(parts).cpu().numpy().tobytes() if parts else b""
    return hashlib.blake2b(repr(state).encode() + sample, digest_size=16).digest()


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


def fingerprint(module: nn.Module) -> str:
    """An exact hash of a module's weights and persistent buffers.

    It depends on names, types, shapes and bytes, and not on the device, the order of registration or the memory
    layout. Tensors are hashed by a few threads (hashing leaves the interpreter free), so that many cores help; at most
    that many tensors are copied at a time.

    Args:
        module: Any module.

    Returns:
        64 hexadecimal digits (BLAKE2b, 256 bits).
    """
    digest = hashlib.blake2b(digest_size=32)
    for part in _hash_entries(sorted(module.state_dict().items())):
        digest.update(part)
    return digest.hexdigest()


def fingerprints(entries: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """An exact hash of each entry of a state dictionary: 32 hexadecimal digits by name (see `fingerprint`)."""
    entries = list(entries)
    return {name: part.hex()[:32] for (name, _), part in zip(entries, _hash_entries(entries), strict=True)}


def _hash_entries(entries: list[tuple[str, Any]]) -> Iterator[bytes]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(_hash_entry, entries)


def _hash_entry(entry: tuple[str, Any]) -> bytes:
    name, value = entry
    digest = hashlib.blake2b(digest_size=32)
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    else:  # quantized layers keep settings among their weights
        digest.update(f"{name}|{value!r}|".encode())
    return digest.digest()
