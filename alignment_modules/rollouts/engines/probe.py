"""A fixed prompt by which an engine is asked whether it computes what the policy does."""

from __future__ import annotations

import torch
from torch import nn

from alignment_modules.policies.modes import reading_mode
from alignment_modules.policies.scoring import score
from alignment_modules.policies.segments import Segments
from alignment_modules.policies.tokenizers import vocabulary_size
from alignment_modules.rollouts.engines.answers import Answer
from alignment_modules.rollouts.engines.protocol import EngineError
from alignment_modules.rollouts.parameters import SamplingParameters

# Not 1: log-probabilities that the server tells before it divides by the temperature differ, too.
PROBE_PARAMETERS = SamplingParameters(16, temperature=0.7)
_PROMPT = 8


def probe_prompt(policy: nn.Module) -> list[int]:
    """Token ids spread over the policy's vocabulary."""
    vocabulary = vocabulary_size(policy) or 1
    return [(7919 * place + 1) % vocabulary for place in range(_PROMPT)]


def probe_difference(policy: nn.Module, answer: Answer | None, tolerance: float, url: str) -> float:
    """The mean difference in nats of what server and policy say of the probe's tokens.

    Args:
        policy: The policy.
        answer: What the server wrote after `probe_prompt`.
        tolerance: Largest difference.
        url: The server's, for messages.

    Raises:
        EngineError: If it is more, or there is no answer.
    """
    if answer is None:
        raise EngineError(f"{url} does not know the adapter that it has just loaded")
    device = next(policy.parameters()).device
    prompt, written = (torch.tensor([ids], device=device) for ids in (probe_prompt(policy), answer.ids))
    segments = Segments.from_prompts(prompt, torch.ones_like(prompt), written, torch.ones_like(written))
    with reading_mode(policy):
        scored = score(policy, segments, temperature=PROBE_PARAMETERS.temperature).token_logps[0].double().cpu()
    difference = float((scored - torch.tensor(answer.logps, dtype=torch.float64)).abs().mean())
    if not difference <= tolerance:
        raise EngineError(
            f"{url} does not compute what the policy does: the log-probabilities of a probe differ by {difference:.3g} "
            f"nats on average, more than probe_tolerance={tolerance:g}. Was it started with another model, without "
            "--logprobs-mode processed_logprobs, or in another precision?"
        )
    return difference
