"""Sampling completions and the log-probabilities of their tokens from a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alignment_modules.functional.support import Support
from alignment_modules.functional.waiting import tell
from alignment_modules.policies.compiling import without_graphs
from alignment_modules.rollouts.decoders.base import Decoder
from alignment_modules.rollouts.decoders.select import select_decoder, without_checkpointing
from alignment_modules.rollouts.filters import inverse_cdf, token_probabilities, truncate_support
from alignment_modules.rollouts.kept_sets import KeptSets
from alignment_modules.rollouts.parameters import SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.seeds import Seeds
from alignment_modules.rollouts.stopping import StopStrings, stop_table

if TYPE_CHECKING:
    from alignment_modules.rollouts.environments.episode import Episode


class NonFiniteLogits(ValueError):
    """A policy gave NaN or infinite logits."""


@dataclass
class Completions:
    """Sampled completions; row `p * num_samples + g` is sample `g` of prompt `p`.

    Attributes:
        ids: `[rows, time]` int64, right padded; time is the longest completion's length.
        mask: `[rows, time]` bool, True on the completion's tokens, its stop token included.
        token_logps: `[rows, time]` float32 log-probabilities under the temperature, over the tokens of `support`, or
            the whole vocabulary where it is None; 0 on padding, NaN where the engine does not tell them.
        truncated: `[rows]` bool, True where the last token is no stop.
        own: `[rows, time]` bool, True on the tokens that the policy wrote; None: all that exist.
        support: `[rows, time]` on the host, what top-k, top-p and min-p kept where each token was drawn; None: they
            kept everything, or the engine does not tell. Its log-probabilities are then over the whole vocabulary.
        prompts: What they were written after, where a batch's own prompts were rendered with tools; None: these.
        episodes: One a row, of those that acted on environments; None: they did not.
    """

    ids: Tensor
    mask: Tensor
    token_logps: Tensor
    truncated: Tensor
    own: Tensor | None = None
    support: Support | None = None
    prompts: Prompts | None = None
    episodes: list[Episode] | None = None

    def prompted(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch with the prompts that these were written after."""
        if self.prompts is None:
            return batch
        return {**batch, "prompts": self.prompts.ids, "prompt_attention_mask": self.prompts.mask}


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
    is decided by `select_decoder`; all give the same numbers. Modes are the caller's business: a policy in train mode
    with dropout samples with dropout. Log-probabilities come from float32 logits (float64 for a float64 policy).

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
    prompts = Prompts.from_padded(prompt_ids, prompt_mask)
    seeds = Seeds(range(prompts.count) if prompt_indices is None else prompt_indices, seed, step)
    stop_strings = StopStrings(parameters.stop_strings, tokenizer) if parameters.stop_strings else None
    return sample_prompts(
        policy,
        prompts,
        parameters,
        num_samples=num_samples,
        seeds=seeds,
        stop_strings=stop_strings,
        pad_token_id=pad_token_id,
    )[0]


@torch.no_grad()
def sample_prompts(
    policy: nn.Module,
    prompts: Prompts,
    parameters: SamplingParameters,
    *,
    num_samples: int,
    seeds: Seeds,
    stop_strings: StopStrings | None = None,
    pad_token_id: int = 0,
    drop: bool = True,
    watch: Callable[[Tensor], None] | None = None,
) -> tuple[Completions, Decoder]:
    """`sample` for prompts without padding; also gives the decoder, which `draw` says more of, and of `watch`.

    Raises:
        ValueError: If there is no sample, or not one index a prompt.
        NonFiniteLogits: If the policy's logits are not finite.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    if len(seeds.indices) != prompts.count:
        raise ValueError(f"prompt_indices must name each of the {prompts.count} prompts, got {len(seeds.indices)}.")
    uniforms = draw_uniforms(seeds, parameters, num_samples, prompts.ids.device)
    bounds = prompts.bounds(parameters.max_completion_length)
    limit = max(bounds) if bounds else parameters.max_completion_length
    limits = torch.tensor(bounds).repeat_interleave(num_samples) if bounds else None
    with without_checkpointing(policy), without_graphs(policy):
        reach = prompts.longest + limit if bounds is None else prompts.reach(bounds)
        decoder = select_decoder(policy, reach)(policy, prompts, num_samples, limit)
        rows = prompts.count * num_samples
        found = draw(
            decoder,
            rows,
            parameters,
            uniforms,
            limits=limits,
            stop_strings=stop_strings,
            pad_token_id=pad_token_id,
            drop=drop,
            watch=watch,
        )
    return found, decoder


def draw_uniforms(
    seeds: Seeds, parameters: SamplingParameters, num_samples: int, device: torch.device, turn: int = 0
) -> Tensor | None:
    """The uniforms `[time, rows]` that decide every token of a turn; None where greedy."""
    if parameters.greedy:
        return None
    drawn = seeds.uniforms(num_samples, parameters.max_completion_length, turn)
    return drawn.t().contiguous().to(device, torch.float32 if device.type == "mps" else torch.float64)


def draw(
    decoder: Decoder,
    count: int,
    parameters: SamplingParameters,
    uniforms: Tensor | None,
    *,
    limits: Tensor | None = None,
    stop_strings: StopStrings | None = None,
    pad_token_id: int = 0,
    drop: bool = True,
    watch: Callable[[Tensor], None] | None = None,
) -> Completions:
    """Draws token by token until every row has stopped; tensors are `[time, rows]` until the end.

    Args:
        decoder: Not yet prefilled.
        count: Rows, a multiple of the decoder's prompts.
        parameters: How to draw and when to stop.
        uniforms: `[max_completion_length, count]` in [0, 1); None: the likeliest tokens.
        limits: `[count]` int64 on the host, most tokens of each row; None: `max_completion_length` of all.
        stop_strings: Strings that end a completion.
        pad_token_id: Written behind the completions.
        drop: Whether finished rows leave the decoder, which can then not be resumed.
        watch: Gets the ids `[time so far, rows]` as each token is drawn; what it raises ends the drawing.

    Raises:
        NonFiniteLogits: If the policy's logits are not finite.
    """
    logits = decoder.prefill()
    logits = logits.repeat_interleave(count // len(logits), dim=0)
    limit = parameters.max_completion_length if limits is None else int(limits.max())
    device = logits.device
    limits = None if limits is None else limits.to(device)
    is_stop = stop_table(parameters.stop_token_ids, logits.shape[-1], device)
    kept_sets = KeptSets(count, limit)
    check_every = 1 if device.type == "cpu" else 8  # counting the alive rows waits for an accelerator
    ids = torch.full((limit, count), pad_token_id, dtype=torch.int64, device=device)
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    chosen = torch.ones(limit, count, dtype=exact, device=device)
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    stopped = torch.zeros(count, dtype=torch.bool, device=device)
    rows = torch.arange(count, device=device)
    alive = torch.ones(count, dtype=torch.bool, device=device)
    for time in range(limit):
        tokens, likely, kept = _choose(logits, parameters, None if uniforms is None else uniforms[time])
        ids[time].index_copy_(0, rows, tokens)
        chosen[time].index_copy_(0, rows, likely)
        if kept is not None:
            kept_sets.add(time, rows, kept)
        if watch is not None:
            watch(ids[: time + 1])
        lengths.index_add_(0, rows, alive.long())
        now = is_stop[tokens]
        if stop_strings is not None:
            now = now | torch.tensor(stop_strings.completed(ids[: time + 1, rows].t()), device=device)
        stopped.index_copy_(0, rows, stopped[rows] | now)
        alive = alive & ~now
        if limits is not None:
            alive = alive & (limits > time + 1)
        if time + 1 == limit:
            break
        if (time + 1) % check_every == 0:
            kept_sets.store()
            remaining = int(alive.sum())
            tell("sampling", count - remaining, count)
            if remaining == 0:
                break
            if drop and remaining <= 0.75 * len(rows):
                kept = alive.nonzero().squeeze(1)
                decoder.keep(kept)
                rows, tokens, alive = rows[kept], tokens[kept], alive[kept]
                uniforms = None if uniforms is None else uniforms[:, kept].contiguous()
                limits = None if limits is None else limits[kept]
        logits = decoder.step(tokens)
    longest = int(lengths.max())
    mask = torch.arange(longest, device=device) < lengths[:, None]
    token_logps = chosen[:longest].t().log().float().masked_fill(~mask, 0.0)
    if not bool(token_logps.isfinite().all()):
        raise NonFiniteLogits("policy gave logits that are not finite; its weights or inputs may hold NaN or infinity.")
    truncates = uniforms is not None and parameters.truncates_support
    support = kept_sets.support(mask.cpu()) if truncates else None
    return Completions(ids[:longest].t().masked_fill(~mask, pad_token_id), mask, token_logps, ~stopped, support=support)


def _choose(
    logits: Tensor, parameters: SamplingParameters, uniforms: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One token a row, its probability, and where the support is truncated what it was drawn from.

    Args:
        logits: `[rows, vocabulary]`.
        parameters: How to draw.
        uniforms: `[rows]` in [0, 1); None: the likeliest token.

    Returns:
        `[rows]` int64, `[rows]` float, `[rows, vocabulary]` bool or None.
    """
    probabilities, kept = token_probabilities(logits, parameters.temperature or 1.0), None
    if uniforms is None:
        tokens = logits.argmax(-1)
    elif not parameters.truncates_support:
        tokens = inverse_cdf(probabilities, uniforms)
    else:
        probabilities = truncate_support(
            probabilities, top_k=parameters.top_k, top_p=parameters.top_p, min_p=parameters.min_p
        )
        tokens, kept = inverse_cdf(probabilities, uniforms), probabilities > 0
    likely = probabilities.gather(1, tokens[:, None]).squeeze(1)
    return tokens, likely if kept is None else likely / probabilities.sum(dim=-1), kept
