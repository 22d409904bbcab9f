"""Which decoder a policy gets: a structural test, then one numeric comparison with the model's plain forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from alignment_modules.policies.context import check_length, length_limit
from alignment_modules.policies.modes import eval_mode
from alignment_modules.rollouts.decoders.base import DecoderFactory, RecomputeDecoder, accepts
from alignment_modules.rollouts.decoders.cached import CachedDecoder
from alignment_modules.rollouts.decoders.llama.decoder import FastDecoder
from alignment_modules.rollouts.decoders.llama.weights import no_fast_decoding
from alignment_modules.rollouts.prompts import Prompts

_REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)

logger = logging.getLogger(__name__)

_verdicts: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], str]] = WeakKeyDictionary()


def select_decoder(policy: nn.Module, longest: int) -> DecoderFactory:
    """The fastest decoder that is right for a policy.

    The candidates are tried in order: the Llama family's own decoder, a key/value cache through transformers' forward,
    recomputation. A candidate that fits the policy's structure has to reproduce the logits of plain forwards on two
    short random prompts, once per module and float type; a failure is logged with its size and the next is tried.

    Args:
        policy: Any causal language model.
        longest: Tokens of the longest prompt and completion together. Where a model's cached keys would change with
            the length, as they do beyond the context of dynamic rotary embeddings, nothing can be cached.

    Returns:
        A function that makes the decoder of one rollout.
    """
    check_length(policy, longest, "a prompt with its longest completion")
    limit = length_limit(policy)
    if limit is not None and longest > limit:
        return RecomputeDecoder
    candidates: tuple[tuple[DecoderFactory, Callable[[nn.Module], str | None]], ...] = (
        (FastDecoder, no_fast_decoding),
        (CachedDecoder, _no_cache),
    )
    for factory, obstacle in candidates:
        if obstacle(policy) is None and _verified(policy, factory):
            return factory
    return RecomputeDecoder


def _no_cache(policy: nn.Module) -> str | None:
    """Why a policy has no usable key/value cache; None if it may have one."""
    config = getattr(policy, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return "not a transformers model"
    if accepts(policy, "cache", "past_key_values") is None:
        return "its forward takes no key/value cache"
    return None


def _verified(policy: nn.Module, factory: DecoderFactory) -> bool:
    parameter = next(policy.parameters(), None)
    if parameter is None:
        return False
    key = (factory, parameter.dtype, parameter.device.type)
    verdicts = _verdicts.setdefault(policy, {})
    if key not in verdicts:
        verdicts[key] = _difference(policy, factory, parameter)
        name = getattr(factory, "__name__", str(factory))
        logger.info("rollouts of %s with %s: %s", type(policy).__name__, name, verdicts[key] or "verified")
    return not verdicts[key]


def _difference(policy: nn.Module, factory: DecoderFactory, parameter: Tensor) -> str:
    """What is wrong with a decoder on a small probe; empty if it agrees with recomputation."""
    vocabulary = _vocabulary(policy)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, 5), generator=generator).to(parameter.device)
    tokens = torch.randint(vocabulary, (3, 4), generator=generator).to(parameter.device)
    prompts = Prompts.from_padded(ids, torch.tensor([[0, 0, 1, 1, 1], [1] * 5], device=ids.device))
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-4}.get(parameter.dtype, 5e-2)
    kept = torch.tensor([0, 2, 3], device=ids.device)
    with eval_mode(policy), torch.no_grad():
        reference = RecomputeDecoder(policy, prompts, 2, 3)
        try:
            decoder = factory(policy, prompts, 2, 3)
            outputs = [(decoder.prefill(), reference.prefill())]
            for step in range(2):
                outputs.append((decoder.step(tokens[step]).clone(), reference.step(tokens[step])))
            decoder.keep(kept)
            reference.keep(kept)
            outputs.append((decoder.step(tokens[2, kept]), reference.step(tokens[2, kept])))
        except _REFUSALS as error:
            return f"{type(error).__name__}: {error}"
    for got, wanted in outputs:
        error_size = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))
        if not error_size <= tolerance:
            return f"logits differ by {error_size:.1e} of their size from a plain forward (allowed {tolerance:.0e})"
    return ""


def _vocabulary(policy: nn.Module) -> int:
    embedding = policy.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


@contextmanager
def without_checkpointing(policy: nn.Module) -> Iterator[None]:
    """Gradient checkpointing off for a while: older transformers drop the cache under it, even without gradients."""
    modules = [module for module in policy.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for module in modules:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True  # type: ignore[assignment]
