"""The options below `evaluation`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from alignment_modules.functional.ranges import Count, Natural, Seed
from alignment_modules.rollouts.environments.loop import MAX_TURNS
from alignment_modules.rollouts.environments.options import EnvironmentOption, ToolOptions
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
        seed: Seed of the samples, and of environments.
        environments: What the policy acts on, as the keyword of `EpisodeModule`; None: of a module that acts in
            training, what it acts on there. Where they have rewards and there is no verifier, these judge.
        tools: Functions that it may call, likewise.
        max_turns: Most turns of the policy in an episode.
        max_tool_calls: Most calls in an episode; None: any number.
        tool_options: How calls are read, run and answered.

    Raises:
        ValueError: If a value is outside its range.
    """

    option: ClassVar[str] = "evaluation."

    num_samples: Natural = 0
    verifier: str | Callable | None = None
    seed: Seed = 0
    environments: EnvironmentOption = None
    tools: Any = None
    max_turns: Count = MAX_TURNS
    max_tool_calls: Count | None = None
    tool_options: ToolOptions | None = None
