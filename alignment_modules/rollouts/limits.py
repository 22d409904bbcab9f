"""Limits that single prompts of a batch have: most tokens of a completion."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignment_modules.rollouts.engines.protocol import EngineError
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.sampler import Completions

LIMITS = "completion_limits"
"""A batch's list of them, one a prompt; None for a prompt without."""


def check_limits(batch: Mapping[str, Any], rows: int, longest: int | None = None) -> None:
    """Checks the limits that a batch brings, if it does.

    Args:
        batch: As the loader gives it.
        rows: Its prompts.
        longest: Most tokens that a completion may have at all; None: not known.

    Raises:
        ValueError: If there is another number of limits, or one is no whole number from 1 to `longest`.
    """
    limits = batch.get(LIMITS)
    if limits is None:
        return
    if len(limits) != rows:
        raise ValueError(f"`{LIMITS}` has {len(limits)} numbers for {rows} rows")
    sources = batch.get("source_name")
    for row, limit in enumerate(limits):
        if limit is None:
            continue
        whole = isinstance(limit, int) and not isinstance(limit, bool)
        if not whole or limit < 1 or (longest is not None and limit > longest):
            whose = f" (source {sources[row]!r})" if sources else ""
            allowed = "at least 1" if longest is None else f"from 1 to max_completion_length={longest}"
            raise ValueError(
                f"row {row} of a batch{whose} has {LIMITS}={limit!r}; it must be a whole number {allowed}, or None"
            )


def limited_prompts(batch: Mapping[str, Any]) -> Prompts:
    """A batch's prompts without padding, each with the limit that the batch brings."""
    return Prompts.from_padded(batch["prompts"], batch["prompt_attention_mask"]).limited(batch.get(LIMITS))


def check_kept(completions: Completions, limits: Sequence[int | None] | None, engine: str) -> Completions:
    """Completions of prompts with limits, if an engine has kept these.

    Args:
        completions: A prompt's are neighbours.
        limits: One a prompt, or None for it; None: there are none.
        engine: Its name.

    Raises:
        EngineError: If it has not.
    """
    if limits:
        group = len(completions.mask) // len(limits)
        for row, length in enumerate(completions.mask.sum(dim=1).tolist()):
            limit = limits[row // group]
            if limit is not None and length > limit:
                raise EngineError(
                    f"{engine} gave {length} tokens where the prompt's own limit is {limit}: its `generate` must end "
                    "completions at `prompts.limits`"
                )
    return completions
