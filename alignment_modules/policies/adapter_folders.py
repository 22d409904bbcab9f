"""Saved adapters: put onto their base, or merged into it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from alignment_modules.policies.adapters import adapter_layers
from alignment_modules.policies.forward import classifies


def attach_adapter_folder(
    base: nn.Module, folder: str, revision: str | None = None, *, trainable: bool = False
) -> nn.Module:
    """Loads a saved adapter onto its base model, where it can be switched off (`adapter_off`).

    Args:
        base: The model that the adapter was trained on.
        folder: Folder or hub id that holds `adapter_config.json` and `adapter_model.safetensors`.
        revision: Branch, tag or commit of a hub id.
        trainable: Whether the adapter, and what was trained whole beside it, is to be trained further.

    Returns:
        A `peft.PeftModel`, its base frozen.

    Raises:
        ValueError: The adapter does not fit the base, is of a kind that cannot be switched off, or is not in
            safetensors format.
    """
    import peft

    if Path(folder).is_dir() and not (Path(folder) / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{folder!r} holds adapter_config.json but no adapter_model.safetensors (pickled weights are not loaded)."
        )
    try:
        adapter = peft.PeftConfig.from_pretrained(folder, revision=revision)
        if classifies(base):  # a language model's adapter fits its trunk as well
            adapter.task_type = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model: Any = peft.PeftModel.from_pretrained(  # type: ignore[arg-type,unused-ignore]
                base, folder, config=adapter, revision=revision, is_trainable=trainable
            )
        missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
        if missing:
            raise ValueError(missing[0])
        if not adapter_layers(model):
            raise ValueError("adapters of this kind cannot be merged")
    except Exception as error:  # a truncated file raises safetensors' own error
        raise _does_not_fit(folder, base, error) from error
    return model


def merge_adapter_folder(base: nn.Module, folder: str, revision: str | None = None) -> nn.Module:
    """Loads a saved adapter onto its base model and merges it.

    Args:
        base: As in `attach_adapter_folder`, and so are the others.
        folder: Folder or hub id.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The base with the adapter's update added to its weights, all parameters trainable.

    Raises:
        ValueError: As `attach_adapter_folder`, or the adapter cannot be merged.
    """
    model: Any = attach_adapter_folder(base, folder, revision)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except Exception as error:  # of whatever type each kind of layer raises
        raise _does_not_fit(folder, base, error) from error
    return merged.requires_grad_(True)


def _does_not_fit(folder: str, base: nn.Module, error: Exception) -> ValueError:
    return ValueError(f"The adapter in {folder!r} cannot be merged into its base {type(base).__name__}: {error}")
