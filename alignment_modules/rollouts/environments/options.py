"""The options below `tool_options`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from alignment_modules.functional.ranges import Count, Positive, Range, check_options

EnvironmentOption = str | dict[str, str | bool | int | float | list | dict[str, Any] | None] | Callable | None
"""What a configuration may give as `environments`. Of any type, a command line would make the environment itself, and
not hand on what makes one; what is wrong with a mapping is for `EnvironmentSet` to say."""

MAX_CHARACTERS_PER_TOKEN = 32
"""Of a result no more characters than these for each token of its limit are looked at."""


@dataclass(frozen=True)
class ToolOptions:
    """How the calls that a policy writes are read, run and answered.

    Args:
        format: How calls are written: "json_tags", "llama" or "qwen_xml"; or a function from a turn's text to its
            calls, or the import path of one. None: as the tokenizer's chat template writes them.
        time_limit: Seconds for one call, and for `reset` and `get_reward` of an environment.
        in_process: False runs tools that are given by import path each in a process of their own, which is ended when
            it is late. True: in threads, and one that is late is left to itself.
        max_workers: Calls at the same time.
        max_result_length: Longest result, in tokens; of a text 32 characters for each are kept before it is tokenised.

    Raises:
        ValueError: If a value is outside its range.
    """

    format: str | Callable | None = None
    time_limit: Positive = 10.0
    in_process: bool = True
    max_workers: Annotated[int, Range(1, 1024)] = 32
    max_result_length: Count = 1024

    def __post_init__(self) -> None:
        check_options(ToolOptions, vars(self), "tool_options.")

    @property
    def max_characters(self) -> int:
        """Characters of a result that are kept before it is tokenised."""
        return MAX_CHARACTERS_PER_TOKEN * self.max_result_length
