"""Text in, text out: what a notebook asks of a module."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from alignment_modules.rollouts import SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.seeds import Seeds

if TYPE_CHECKING:
    from alignment_modules.evaluation.evaluator import Evaluator

Messages = list[dict[str, Any]]
TextPrompts = str | Messages | list[str] | list[Messages]


def complete_text(
    evaluator: Evaluator,
    policy: nn.Module,
    prompts: TextPrompts,
    parameters: SamplingParameters | None = None,
    *,
    num_samples: int = 1,
    seed: int = 0,
) -> Any:
    """Completes text with a policy, on whatever device it is.

    Args:
        evaluator: With a tokenizer.
        policy: Who writes.
        prompts: A text, which is completed as it stands; a list of messages, which goes through the tokenizer's chat
            template; or a list of texts or of such lists.
        parameters: How to sample and how much; None: as the evaluator does, greedily where one completion is asked for.
            Without stop tokens of its own it stops at the evaluator's.
        num_samples: Completions of each prompt.
        seed: Seed of the samples.

    Returns:
        A string for one prompt and a list of strings for a list of prompts; with `num_samples` above 1 each of them is
        a list of that many strings.

    Raises:
        ValueError: If there is no tokenizer, no prompt, an empty one, or messages without a chat template.
    """
    codec = evaluator.codec
    if codec.tokenizer is None:
        raise ValueError("tokenizer=None: give the module the tokenizer of its policy to generate from text")
    alone = isinstance(prompts, str) or _are_messages(prompts)
    rows = [codec.encode(prompt) for prompt in ([prompts] if alone else prompts)]  # type: ignore[arg-type]
    if not rows or not all(rows):
        raise ValueError(f"prompts={prompts!r} holds no prompt, or one without a token")
    if parameters is None:
        parameters = evaluator.parameters(greedy=num_samples == 1)
    elif not parameters.stop_token_ids:
        parameters = replace(parameters, stop_token_ids=codec.stop_token_ids)
    device = next((parameter.device for parameter in policy.parameters()), torch.device("cpu"))
    given = Prompts.from_rows(rows, device)
    texts = evaluator.decode(evaluator.complete(policy, given, parameters, num_samples, Seeds(range(len(rows)), seed)))
    found: list[Any] = [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
    found = found if num_samples > 1 else [one for (one,) in found]
    return found[0] if alone else found


def _are_messages(prompts: Any) -> bool:
    return isinstance(prompts, list) and bool(prompts) and all(isinstance(message, dict) for message in prompts)
