"""Text in, text out: what a notebook asks of a module."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from alignment_modules.rollouts import SamplingParameters

if TYPE_CHECKING:
    from alignment_modules.evaluation import GenerationSteps

Messages = list[dict[str, Any]]
TextPrompts = str | Messages | list[str] | list[Messages]


def generate_text(
    module: GenerationSteps,
    prompts: TextPrompts,
    parameters: SamplingParameters | None = None,
    *,
    num_samples: int = 1,
    seed: int = 0,
) -> Any:
    """Completes text with a module's policy and tokenizer, on whatever device it is.

    Args:
        module: With a tokenizer.
        prompts: A text, which is completed as it stands; a list of messages, which goes through the tokenizer's chat
            template; or a list of texts or of such lists.
        parameters: How to sample and how much; None: as the module's `evaluation` says, greedily where one completion
            is asked for. Without stop tokens of its own it stops at the module's.
        num_samples: Completions of each prompt.
        seed: Seed of the samples.

    Returns:
        A string for one prompt and a list of strings for a list of prompts; with `num_samples` above 1 each of them is
        a list of that many strings.

    Raises:
        ValueError: If there is no tokenizer, no prompt, an empty one, or messages without a chat template.
    """
    tokenizer = module.tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer=None: give the module the tokenizer of its policy to generate from text")
    alone = isinstance(prompts, str) or _are_messages(prompts)
    rows = [_encode(tokenizer, prompt) for prompt in ([prompts] if alone else prompts)]
    if not rows or not all(rows):
        raise ValueError(f"prompts={prompts!r} holds no prompt, or one without a token")
    longest = max(map(len, rows))
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    batch = {
        "prompts": torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=module.device),
        "prompt_attention_mask": torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=module.device
        ),
    }
    if parameters is None:
        parameters = module.evaluation_parameters(greedy=num_samples == 1)
    elif not parameters.stop_token_ids:
        parameters = replace(parameters, stop_token_ids=module.stop_token_ids())
    texts = module.decode(module.generate(batch, parameters, num_samples=num_samples, seed=seed))
    found: list[Any] = [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
    found = found if num_samples > 1 else [one for (one,) in found]
    return found[0] if alone else found


def _are_messages(prompts: Any) -> bool:
    return isinstance(prompts, list) and bool(prompts) and all(isinstance(message, dict) for message in prompts)


def _encode(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        encoded = tokenizer(prompt)["input_ids"]
        eos = getattr(tokenizer, "eos_token_id", None)
        # Some tokenizers close every text, which would end the prompt before its completion.
        return encoded[:-1] if len(encoded) > 1 and eos is not None and encoded[-1] == eos else encoded
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("messages need a tokenizer with a chat template; this one has none: give the prompt as text")
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
