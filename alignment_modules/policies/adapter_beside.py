"""A second adapter on a policy's base: a reference or teacher that needs no model of its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from alignment_modules.policies.adapters import has_adapter, lora_layers, trained_base
from alignment_modules.policies.config import PolicyConfig, adapter_config, check_holds_adapter, resolve_folder
from alignment_modules.policies.weights import building_device, shapes_only

_READ = ("path", "revision", "trust_remote_code", "merge_adapter")


def put_beside(policy: nn.Module, adapter: PolicyConfig, name: str) -> str:
    """Loads a saved adapter of a policy's base beside the policy's own, frozen and switched off.

    Args:
        policy: A policy under LoRA, its base frozen; it gets a second adapter.
        adapter: Whose `merge_adapter` is False.
        name: What the adapter is for, such as "reference", for its name and for errors.

    Returns:
        The adapter's name in `policy.peft_config`; `adapter_alone` switches to it.

    Raises:
        ValueError: The policy has no adapters or trains its base, or the adapter is of another base or kind, or an
            option is given that the policy's base decides.
    """
    _check_policy(policy, name)
    path = resolve_folder(str(adapter.path), f"{name}.path")
    options = adapter_config(path, adapter.revision)
    if options is None:
        check_holds_adapter(adapter, path)
    _check_options(adapter, name)
    _check_same_base(policy, options or {}, path, name)
    key = name.replace(".", "_")
    if key in policy.peft_config:  # type: ignore[operator]
        raise ValueError(f"{name}: the policy already has an adapter of this name; build it anew for another module")
    with _undisturbed(policy), building_device():
        _load(policy, path, adapter.revision, key, name)
    return key


def _load(policy: Any, path: str, revision: str | None, key: str, name: str) -> None:
    import peft

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if shapes_only():
                policy.add_adapter(key, peft.PeftConfig.from_pretrained(path, revision=revision))
            else:
                policy.load_adapter(path, key, revision=revision)
        missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
        if missing:
            raise ValueError(missing[0])
    except Exception as error:  # a truncated file raises safetensors' own error
        raise ValueError(f"{name}: the adapter in {path!r} does not fit the policy's base: {error}") from error
    for parameter_name, parameter in policy.named_parameters():
        if f".{key}." in parameter_name:
            parameter.requires_grad_(False)


@contextmanager
def _undisturbed(policy: Any) -> Iterator[None]:
    """Keeps modes, flags and what is switched on through what `peft` does on loading an adapter."""
    training = [module for module in policy.modules() if module.training]
    flags = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    active = {layer: list(layer.active_adapters) for _, layer in lora_layers(policy)}
    try:
        yield
    finally:
        for _, layer in lora_layers(policy):  # one that the policy's own adapter leaves out has nothing on
            layer.set_adapter(active.get(layer, [policy.active_adapter]))
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module in training:
            module.training = True


def _check_policy(policy: Any, name: str) -> None:
    if not has_adapter(policy) or not hasattr(policy, "peft_config"):
        raise ValueError(
            f"{name}.merge_adapter=False shares the base of a policy that trains adapters, and {type(policy).__name__} "
            f"trains all of its weights: leave {name}.merge_adapter out, or give policy.lora"
        )
    if moved := trained_base(policy):
        raise ValueError(
            f"{name}.merge_adapter=False shares the policy's base, of which {moved[0]!r} is trained, so that it would "
            f"not stay as it is: leave {name}.merge_adapter out"
        )


def _check_options(adapter: PolicyConfig, name: str) -> None:
    for option in fields(PolicyConfig):
        if option.name not in _READ and getattr(adapter, option.name) != option.default:
            raise ValueError(
                f"{name}.{option.name}={getattr(adapter, option.name)!r} has no effect with "
                f"{name}.merge_adapter=False, which shares the policy's base: leave one of the two out"
            )


def _check_same_base(policy: Any, options: dict[str, Any], path: str, name: str) -> None:
    way = f"leave {name}.merge_adapter out, and it is loaded as a model of its own"
    own, theirs = policy.peft_config[policy.active_adapter], options.get("base_model_name_or_path")
    ours = own.base_model_name_or_path
    if not ours:
        raise ValueError(
            f"{name}.merge_adapter=False: the policy's base is on no disk, so it cannot be that of the adapter in "
            f"{path!r}, which is {theirs!r}: {way}"
        )
    if _place(ours) != _place(theirs) or (own.revision or "main") != (options.get("revision") or "main"):
        raise ValueError(
            f"{name}.merge_adapter=False: the adapter in {path!r} is of the base {theirs!r}, and the policy's is "
            f"{ours!r}: {way}"
        )
    kind = str(options.get("peft_type"))
    trained = [key for key in ("modules_to_save", "trainable_token_indices") if options.get(key)]
    if kind != "LORA" or trained or options.get("bias", "none") != "none":
        what = trained[0] if trained else f"bias={options.get('bias')!r}" if kind == "LORA" else f"peft_type={kind!r}"
        raise ValueError(
            f"{name}.merge_adapter=False: the adapter in {path!r} is not of LoRA alone ({what}), so a base cannot be "
            f"shared with it: {way}"
        )


def _place(base: Any) -> str:
    folder = Path(str(base)).expanduser()
    return os.path.realpath(folder) if folder.is_dir() else str(base)
