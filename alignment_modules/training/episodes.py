"""What paradigms share whose policy may act on environments."""

from collections.abc import Callable, Mapping
from typing import Any

from alignment_modules.functional.ranges import Count, check_options
from alignment_modules.rewards import RewardSet
from alignment_modules.rollouts.environments.loop import MAX_TURNS
from alignment_modules.rollouts.environments.making import make_episodes
from alignment_modules.rollouts.environments.options import EnvironmentOption, ToolOptions
from alignment_modules.rollouts.environments.rewards import EnvironmentReward
from alignment_modules.training.engines import EngineModule


class EpisodeModule(EngineModule):
    """Base of paradigms whose completions may be episodes: several turns, with tools between them.

    Args:
        environments: What the policy acts on: a class (or another factory), its import path, or `class_path` with
            `init_args`; or several by name, of which a row's column `environment`, or else its source in a mixture,
            chooses one. See docs/environments.md.
        tools: Functions without state that it may call, or their import paths.
        max_turns: Most turns of the policy in an episode.
        max_tool_calls: Most calls in an episode; None: any number.
        tool_options: How calls are read, run and answered.
        **common: Keywords of `EngineModule` (engine), of what it is mixed with, and of `AlignmentModule` (policy,
            optimizer, lr_scheduler, tokenizer, evaluation).

    Raises:
        ValueError: If an environment or tool cannot be found, made or shown to a policy, an option would have no
            effect, or the engine has no sessions.
    """

    def __init__(
        self,
        *,
        environments: EnvironmentOption = None,
        tools: Any = None,
        max_turns: Count = MAX_TURNS,
        max_tool_calls: Count | None = None,
        tool_options: ToolOptions | None = None,
        **common: Any,
    ) -> None:
        check_options(EpisodeModule.__init__, locals())
        super().__init__(**common)
        self.episodes = make_episodes(
            environments,
            tools,
            codec=self.codec,
            max_turns=max_turns,
            max_tool_calls=max_tool_calls,
            tool_options=tool_options,
        )
        if self.episodes is None:
            return
        if not self.engine.has_sessions:
            raise ValueError(f"engine={type(self.engine).__name__} has no sessions, which environments and tools need")
        if self.evaluator is not None and self.evaluator.episodes is None:
            self.evaluator.act_on(self.episodes)

    def reward_set(
        self, rewards: str | list[str | Callable] | Callable | None, weights: list[float] | None
    ) -> RewardSet:
        """Reward functions, and behind them what the environments say.

        Args:
            rewards: As people give them; None: none.
            weights: One a function, with or without one more for the environments; None: all 1.

        Raises:
            ValueError: If there is neither, or as in `RewardSet`.
        """
        functions: list[Any] = [] if rewards is None else list(rewards) if isinstance(rewards, list) else [rewards]
        if self.episodes is not None and self.episodes.environments.judges:
            if weights is not None and len(weights) == len(functions):
                weights = [*weights, 1.0]
            functions.append(EnvironmentReward())
        elif rewards is None:
            raise ValueError("rewards=None must be reward functions, unless `environments` have a get_reward")
        return RewardSet(functions, weights)

    def setup(self, stage: str) -> None:
        """Also checks, once the tokenizer is known, that its chat template can show what the policy acts on.

        Raises:
            ValueError: If it cannot.
        """
        super().setup(stage)
        if self.episodes is not None and self.tokenizer is not None:
            self.episodes.prepare()

    def check_batch(self, batch: Any) -> None:
        """Also checks that a batch whose rows the policy is to act on has what their environments ask for.

        Raises:
            ValueError: If it has not.
        """
        super().check_batch(batch)
        if self.episodes is not None and self.acts_on(batch):
            self.episodes.check(batch)

    def acts_on(self, batch: Mapping[str, Any]) -> bool:
        """Whether the policy is to act on a batch's rows: not where they bring completions."""
        return "responses" not in batch

    def columns_of_episodes(self, batch: Mapping[str, Any]) -> list[str]:
        """What reward functions may ask for beside the columns of a batch."""
        return ["episodes"] if self.episodes is not None and self.acts_on(batch) else []

    def describe(self) -> dict[str, str]:
        """Adds what the policy acts on."""
        return super().describe() | ({} if self.episodes is None else {"environments": self.episodes.describe()})
