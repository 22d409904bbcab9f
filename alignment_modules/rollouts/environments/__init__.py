"""Several turns and tools: environments, the calls a policy writes, and what runs them."""

from alignment_modules.rollouts.environments.episode import STOP_REASONS, CallMade, Episode
from alignment_modules.rollouts.environments.formats import Call, Parsed, ToolFormat, detect, tool_format
from alignment_modules.rollouts.environments.options import ToolOptions
from alignment_modules.rollouts.environments.results import Result
from alignment_modules.rollouts.environments.running import Job, Outcome, Request, Runner
from alignment_modules.rollouts.environments.schemas import ArgumentError, Tool
from alignment_modules.rollouts.environments.statistics import episode_statistics
from alignment_modules.rollouts.environments.tool_set import EnvironmentSet
from alignment_modules.rollouts.environments.turns import TurnRenderer

__all__ = [
    "STOP_REASONS",
    "ArgumentError",
    "Call",
    "CallMade",
    "EnvironmentSet",
    "Episode",
    "Job",
    "Outcome",
    "Parsed",
    "Request",
    "Result",
    "Runner",
    "Tool",
    "ToolFormat",
    "ToolOptions",
    "TurnRenderer",
    "detect",
    "episode_statistics",
    "tool_format",
]
