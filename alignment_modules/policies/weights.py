"""Reading the weights of a model of transformers, or its shapes alone.

`transformers` is imported when a model is read, never by importing this module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

_SHAPES_ONLY = ContextVar("shapes_only", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Within it models are built on the meta device, from their configuration: nothing is read, drawn or computed."""
    token = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(token)


def shapes_only() -> bool:
    """Whether models are built without their weights now."""
    return _SHAPES_ONLY.get()


def building_device() -> AbstractContextManager[Any]:
    """Where modules are to be made: the meta device in `without_weights`, else wherever they would be."""
    return torch.device("meta") if shapes_only() else nullcontext()


@contextmanager
def without_bar() -> Iterator[None]:
    """Keeps transformers' progress bars from the screen."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def has_weights(model: nn.Module) -> bool:
    """Whether none of a model's parameters is on the meta device."""
    return not any(parameter.is_meta for parameter in model.parameters())


def read_model(
    auto: Any, path: str, *, dtype: torch.dtype | str, trust_remote_code: bool, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """`auto.from_pretrained` from safetensors; in `without_weights` the shapes that config.json describes.

    Args:
        auto: A class of transformers such as `AutoModelForCausalLM`.
        path: Folder or hub id.
        dtype: Of the weights; "auto": as they are stored.
        trust_remote_code: Run code that comes with `path`.
        **options: More keywords of `from_pretrained`.

    Returns:
        The model, and what transformers reports on its keys.
    """
    if not shapes_only():
        # Where it cannot be drawn over, in a file or a notebook, each of a bar's states would stay.
        with nullcontext() if sys.stderr.isatty() else without_bar():
            return auto.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
            )
    import transformers

    read = {key: value for key, value in options.items() if key in ("revision", "num_labels")}
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **read)
    held = {key: value for key, value in options.items() if key == "attn_implementation"}
    stored = getattr(config, "dtype", None) or torch.float32
    with building_device():
        model = auto.from_config(
            config, dtype=stored if dtype == "auto" else dtype, trust_remote_code=trust_remote_code, **held
        )
    return model, {"missing_keys": set(), "unexpected_keys": set()}


def start_head(model: Any, zero: bool) -> None:
    """A new scalar head: 0, or normal with variance 1 / (hidden + 1) from the global seed (arXiv:2009.01325)."""
    with torch.no_grad():
        model.score.weight.normal_(std=0.0 if zero else (model.score.weight.shape[1] + 1) ** -0.5)
