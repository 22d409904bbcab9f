"""Reading the weights of a model of transformers, or its shapes alone.

`transformers` is imported when a model is read, never by importing this module.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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


@contextmanager
def on_first_process() -> Iterator[None]:
    """Within it only the first process of a run gives models weights; in others they are built on the meta device.

    For runs whose strategy shards: what a module holds is handed out when the Trainer shards it, and the whole of a
    model lies in the memory of one process. Processes are told apart by their launcher's environment.
    """
    with nullcontext() if is_first_process() else without_weights():
        yield


def is_first_process() -> bool:
    """Whether this process is the run's first, as far as its launcher tells before there is a Trainer."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


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

    revision = {key: value for key, value in options.items() if key == "revision"}
    read = revision | {key: value for key, value in options.items() if key == "num_labels"}
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **read)
    held = {key: value for key, value in options.items() if key == "attn_implementation"}
    stored = getattr(config, "dtype", None) or torch.float32
    with building_device():
        model = auto.from_config(
            config, dtype=stored if dtype == "auto" else dtype, trust_remote_code=trust_remote_code, **held
        )
    if auto is transformers.AutoModelForCausalLM:  # where a text ends is no weight
        with suppress(OSError):
            model.generation_config = transformers.GenerationConfig.from_pretrained(path, **revision)
    return model, {"missing_keys": set(), "unexpected_keys": set()}


def start_head(model: Any, zero: bool) -> None:
    """A new scalar head: 0, or normal with variance 1 / (hidden + 1) from the global seed (arXiv:2009.01325)."""
    with torch.no_grad():
        model.score.weight.normal_(std=0.0 if zero else (model.score.weight.shape[1] + 1) ** -0.5)
