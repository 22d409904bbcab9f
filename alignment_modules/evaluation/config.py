"""The options below `evaluation`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from alignment_modules.functional.ranges import Natural, Seed
from alignment_modules.rollouts.parameters import SamplingOptions


@dataclass(frozen=True)
class EvaluationConfig(SamplingOptions):
    """How `test` and `predict` generate and judge completions.

    Args:
        max_completion_length: Longest completion, in tokens.
        temperature: Temperature of the samples.
        top_p: Nucleus size of the samples.
        top_k: Number of likeliest tokens kept for the samples; 0 keeps all.
        min_p: Tokens less likely than this share of the likeliest are dropped; 0 keeps all.
        stop_strings: Completions also end with these strings.
        num_samples: Completions sampled for each prompt, beside the greedy one. `test` reports pass@num_samples;
            `predict` writes the samples, scored by the verifier where its column is there. 0: greedy only.
        verifier: A reward, or the import path of one: a completion is correct when it gives 1 or more.
            None: exact match with the column `answer`. Where it does not apply (None, NaN), a completion is not
            counted, but in `frac_not_judged`.
        seed: Seed of the samples.

    Raises:
        ValueError: If a value is outside its range.
    """

    option: ClassVar[str] = "evaluation."

    num_samples: Natural = 0
    verifier: str | Callable | None = None
    seed: Seed = 0
