"""What a model's configuration asks for that this library does not do: said or refused by name."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from alignment_modules.policies.quantization import check_can_be_sent, count
from alignment_modules.policies.sharded import class_of

logger = logging.getLogger(__name__)

_OTHER_SENSES = ("vision_config", "audio_config", "image_config", "video_config", "speech_config", "vision_tower")
# Coefficients of auxiliary losses. The first count only where the model is told to give its router's logits.
_WITH_ROUTER_LOGITS = ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef", "moe_loss_weight")
_ALWAYS = ("aux_loss_alpha", "z_loss_coef", "z_loss_coefficient", "moe_aux_loss_coeff", "moe_z_loss_coeff")
_MORE_HEADS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_loss_weight")


def check_text_only(config: Mapping[str, Any], source: str) -> None:
    """Refuses a model that also sees or hears: batches here hold tokens of text alone.

    Args:
        config: The model's configuration.
        source: Where it comes from, for the message.

    Raises:
        ValueError: If it has a part for another sense.
    """
    found = [key for key in _OTHER_SENSES if config.get(key)]
    if found:
        raise ValueError(
            f"{source} is a multimodal model: its configuration (model_type={config.get('model_type')!r}) has "
            f"{', '.join(found)}. Allowed are language models of text alone, such as the family's text model in a "
            "folder of its own"
        )


def left_out_losses(model: nn.Module, added: Collection[str] = ()) -> dict[str, Any]:
    """Keys and values of a model's configuration that ask for an auxiliary loss of its own.

    Args:
        model: Any module; one without a configuration asks for nothing.
        added: Coefficients whose losses are added.

    Returns:
        Such as `{"output_router_logits": True, "router_aux_loss_coef": 0.01}`; empty: nothing is left out.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return {}
    values: dict[str, Any] = {}
    _flatten(config.to_dict(), values)
    found = {key: values[key] for key in (*_ALWAYS, *_MORE_HEADS) if values.get(key)}
    if values.get("output_router_logits"):
        coefficients = {key: values[key] for key in _WITH_ROUTER_LOGITS if key in values and key not in added}
        if any(coefficients.values()) or not (coefficients or added):
            found |= {"output_router_logits": True, **coefficients}
    return found


def warn_of_left_out_losses(model: nn.Module, added: Collection[str] = ()) -> None:
    """Says once, when a policy is built, that its configuration asks for a loss that is not added."""
    found = left_out_losses(model, added)
    if found:
        listed = ", ".join(f"{key}={value!r}" for key, value in found.items())
        logger.warning(
            "%s is trained without the auxiliary loss that its configuration asks for (%s): the objective is the "
            "paradigm's alone.",
            type(model).__name__,
            listed,
        )


def _flatten(config: Mapping[str, Any], into: dict[str, Any]) -> None:
    for key, value in config.items():
        if isinstance(value, Mapping):
            _flatten(value, into)
        else:
            into.setdefault(key, value)


def check_trainable_types(module: nn.Module) -> None:
    """Refuses to train weights held in 16-bit floats of small range.

    An update of float16 weights underflows, and so does the epsilon of Adam's denominator, which divides by zero.

    Raises:
        ValueError: If a trainable parameter is float16; the message names the first.
    """
    half = [name for name, p in module.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ValueError(
            f"{half[0]!r} and {len(half) - 1} more trainable parameters are float16, in which updates underflow: hold "
            "the weights in float32 (policy.dtype='float32', with Trainer(precision='bf16-mixed') to compute in 16 "
            "bits) or in bfloat16 (policy.dtype='bfloat16')"
        )


def check_trainer(trainer: Any, stage: str) -> None:
    """Refuses to compute a training step in float16, where the sums over its tokens overflow, and to clip at NaN.

    Weights that cannot be sent to other processes are refused on several.

    Args:
        trainer: Lightning's.
        stage: "fit", or another.

    Raises:
        ValueError: If the Trainer is to do so.
    """
    precision, clip = trainer.precision, trainer.gradient_clip_val
    if stage == "fit" and precision in ("16-mixed", "16-true", "transformer-engine-float16"):
        raise ValueError(
            f"Trainer(precision={precision!r}) is not allowed: the sums of a language model's step overflow float16 "
            "gradients. Use 'bf16-mixed', or '32-true'"
        )
    if math.isnan(clip or 0.0):
        raise ValueError(f"Trainer(gradient_clip_val={clip}) must be a number, or null")
    if trainer.world_size > 1 and trainer.lightning_module is not None:
        check_can_be_sent(trainer.lightning_module)


def refuse_compiled(module: nn.Module) -> None:
    """Refuses `torch.compile(module)` of a whole training module: its steps look at numbers that no graph holds.

    Raises:
        ValueError: If Lightning was given a compiled module; the message says what to compile.
    """
    if getattr(module, "_compiler_ctx", None) is not None:
        name = type(module).__name__
        raise ValueError(
            f"torch.compile({name}(...)) is not possible: a training step decides by lengths and counts. Compile the "
            f"layers of its model: {name}(policy=PolicyConfig(..., compile=True), ...)"
        )


def own_stop_ids(model: nn.Module, vocabulary: int | None) -> list[int]:
    """The end-of-sequence ids of a model's generation configuration that its vocabulary holds.

    Some folders keep those of the model they were made from in `generation_config.json`; they are left out with a
    warning.

    Args:
        model: Any module.
        vocabulary: Number of its embeddings; None: unknown, nothing is left out.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    outside = [token for token in ids if vocabulary is not None and not 0 <= token < vocabulary]
    if outside:
        folder = getattr(model, "name_or_path", "")
        warnings.warn(
            f"eos_token_id={configured} of {folder or type(model).__name__}/generation_config.json: {outside} lie "
            f"outside the model's vocabulary of {vocabulary} tokens and stop nothing; they are left out",
            stacklevel=2,
        )
    return [int(token) for token in ids if token not in outside]


def describe_size(model: nn.Module) -> str:
    """A model's class and numbers of parameters, for people."""
    total = sum(map(count, model.parameters()))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{class_of(model).__name__}, {total:,} parameters, {trained:,} of them trained"
