"""Sampling completions and the log-probabilities of their tokens from a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from alignment_modules.functional.ranges import Count, Natural, NonNegative, Range, Share, check_options
from alignment_modules.rollouts.decoding import Decoder
from alignment_modules.rollouts.filters import inverse_cdf, token_probabilities, truncate_support
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.seeds import sample_uniforms
from alignment_modules.rollouts.selection import select_decoder, without_checkpointing
from alignment_modules.rollouts.stopping import StopStrings, stop_table


@dataclass(frozen=True)
class SamplingParameters:
    """How completions are drawn.

    Attributes:
        max_completion_length: Most tokens in a completion; one that reaches it without a stop is truncated.
        temperature: Divides the logits, for sampling and for the log-probabilities. Must be > 0 unless `greedy`, where
            it does not matter for the choice and 0 means that log-probabilities are under 1.
        top_p: Keeps the smallest set of likeliest tokens with this mass; 1 keeps all.
        top_k: Keeps this many likeliest tokens; 0 keeps all.
        min_p: Keeps tokens at least this many times as likely as the likeliest; 0 keeps all.
        greedy: Takes the likeliest token instead of sampling.
        stop_token_ids: Tokens that end a completion and belong to it.
        stop_strings: A completion ends with the token that completes one of these.

    Raises:
        ValueError: If a value is outside its range.
    """

    max_completion_length: Count
    temperature: NonNegative = 1.0
    top_p: Annotated[float, Range(0, 1, "(]")] = 1.0
    top_k: Natural = 0
    min_p: Share = 0.0
    greedy: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_options(SamplingParameters, vars(self))
        if not self.greedy and not self.temperature:
            raise ValueError(f"temperature={self.temperature} must be > 0 unless greedy=True")

    @property
    def truncates_support(self) -> bool:
        """Whether tokens are drawn from fewer than the policy gives a probability to."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


class NonFiniteLogits(ValueError):
    """A policy gave NaN or infinite logits."""


@dataclass
class Completions:
    """Sampled completions; row `p * num_samples + g` is sample `g` of prompt `p`.

    Attributes:
        ids: `[rows, time]` int64, right padded; time is the longest completion's length.
        mask: `[rows, time]` bool, True on the completion's tokens, its stop token included.
        token_logps: `[rows, time]` float32 log-probabilities under the temperature over the full vocabulary (before
            top-k, top-p and min-p); 0 on padding.
        truncated: `[rows]` bool, True where the length limit came before a stop.
    """

    ids: Tensor
    mask: Tensor
    token_logps: Tensor
    truncated: Tensor


@torch.no_grad()
def sample(
    policy: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    parameters: SamplingParameters,
    num_samples: int = 1,
    seed: int = 0,
    step: int = 0,
    prompt_indices: Sequence[int] | None = None,
    pad_token_id: int = 0,
    tokenizer: Any = None,
) -> Completions:
    """Samples completions of each prompt without gradients.

    Each prompt is run once, whatever the number of its samples, and finished rows leave the batch. Which forward runs
    is decided by :func:`alignment_modules.rollouts.selection.select_decoder`; all give the same numbers. Modes are the
    caller's business: a policy in train mode with dropout samples with dropout. Log-probabilities come from float32
    logits (float64 for a float64 policy).

    Args:
        policy: A transformers causal language model, a peft model around one, or any module from `input_ids` to logits.
        prompt_ids: `[prompts, time]` int64.
        prompt_mask: `[prompts, time]`, nonzero on tokens; padding may be on either side. Positions count real tokens
            only: a prompt's first token has position 0.
        parameters: How to draw and when to stop.
        num_samples: Samples per prompt.
        seed: Base seed.
        step: Counter of rollouts under this seed.
        prompt_indices: Identity of each prompt. Sample `g` of prompt index `i` is decided by `(seed, step, i, g)` and
            the prompt alone, so it can be replayed in any batch (up to float rounding of batched matrix products).
            Default: 0, 1, 2, ...
        pad_token_id: Written behind the completions.
        tokenizer: Needed for stop strings.

    Returns:
        `prompts * num_samples` completions.

    Raises:
        ValueError: If an argument is outside its range or a prompt has no token.
        NonFiniteLogits: If the policy's logits are not finite; also a ValueError.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    prompts = Prompts.from_padded(prompt_ids, prompt_mask)
    indices = range(prompts.count) if prompt_indices is None else [int(index) for index in prompt_indices]
    if len(indices) != prompts.count:
        raise ValueError(f"prompt_indices must name each of the {prompts.count} prompts, got {len(indices)}.")
    stop_strings = StopStrings(parameters.stop_strings, tokenizer) if parameters.stop_strings else None
    uniforms = None
    if not parameters.greedy:
        drawn = sample_uniforms(seed, step, indices, num_samples, parameters.max_completion_length)
        uniforms = drawn.t().contiguous().to(prompt_ids.device, torch.float32 if prompt_ids.is_mps else torch.float64)
    with without_checkpointing(policy):
        longest = prompts.ids.shape[1] + parameters.max_completion_length
        decoder = select_decoder(policy, longest)(policy, prompts, num_samples, parameters.max_completion_length)
        return _rollout(decoder, prompts.count, num_samples, parameters, uniforms, stop_strings, pad_token_id)


def _rollout(
    decoder: Decoder,
    num_prompts: int,
    num_samples: int,
    parameters: SamplingParameters,
    uniforms: Tensor | None,
    stop_strings: StopStrings | None,
    pad_token_id: int,
) -> Completions:
    """Draws token by token until every row has stopped; tensors are `[time, rows]` until the end."""
    limit, count = parameters.max_completion_length, num_prompts * num_samples
    logits = decoder.prefill().repeat_interleave(num_samples, dim=0)
    device = logits.device
    is_stop = stop_table(parameters.stop_token_ids, logits.shape[-1], device)
    temperature = parameters.temperature or 1.0
    check_every = 1 if device.type == "cpu" else 8  # counting the alive rows waits for an accelerator
    ids = torch.full((limit, count), pad_token_id, dtype=torch.int64, device=device)
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    chosen = torch.ones(limit, count, dtype=exact, device=device)
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    stopped = torch.zeros(count, dtype=torch.bool, device=device)
    rows = torch.arange(count, device=device)
    alive = torch.ones(count, dtype=torch.bool, device=device)
    for time in range(limit):
        probabilities = token_probabilities(logits, temperature)
        if uniforms is None:
            tokens = logits.argmax(-1)
        else:
            weights = probabilities
            if parameters.truncates_support:
                weights = truncate_support(
                    probabilities, top_k=parameters.top_k, top_p=parameters.top_p, min_p=parameters.min_p
                )
            tokens = inverse_cdf(weights, uniforms[time])
        ids[time].index_copy_(0, rows, tokens)
        chosen[time].index_copy_(0, rows, probabilities.gather(1, tokens[:, None]).squeeze(1))
        lengths.index_add_(0, rows, alive.long())
        now = is_stop[tokens]
        if stop_strings is not None:
            now = now | torch.tensor(stop_strings.completed(ids[: time + 1, rows].t()), device=device)
        stopped.index_copy_(0, rows, stopped[rows] | now)
        alive = alive & ~now
        if time + 1 == limit:
            break
        if (time + 1) % check_every == 0:
            remaining = int(alive.sum())
            if remaining == 0:
                break
            if remaining <= 0.75 * len(rows):
                kept = alive.nonzero().squeeze(1)
                decoder.keep(kept)
                rows, tokens, alive = rows[kept], tokens[kept], alive[kept]
                uniforms = None if uniforms is None else uniforms[:, kept].contiguous()
        logits = decoder.step(tokens)
    longest = int(lengths.max())
    mask = torch.arange(longest, device=device) < lengths[:, None]
    token_logps = chosen[:longest].t().log().float().masked_fill(~mask, 0.0)
    if not bool(token_logps.isfinite().all()):
        raise NonFiniteLogits("policy gave logits that are not finite; its weights or inputs may hold NaN or infinity.")
    return Completions(ids[:longest].t().masked_fill(~mask, pad_token_id), mask, token_logps, ~stopped)
