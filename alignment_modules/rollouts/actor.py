"""An actor completes prompts and has the completions judged: what every online paradigm starts a step with."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.functional.sources import SOURCES, by_source
from alignment_modules.functional.statistics import Statistic
from alignment_modules.rewards import RewardError, RewardSet, RewardTable
from alignment_modules.rewards.judged_rows import REWARD_NAMES
from alignment_modules.rollouts.codec import Codec, columns_of, messages_of, prompt_indices, real_tokens
from alignment_modules.rollouts.engines import Engine, EngineError
from alignment_modules.rollouts.environments.episode import Episode
from alignment_modules.rollouts.environments.loop import Episodes
from alignment_modules.rollouts.environments.rewards import EnvironmentReward, failed, placed_turn_rewards
from alignment_modules.rollouts.environments.showing import episode_columns
from alignment_modules.rollouts.environments.statistics import episode_statistics
from alignment_modules.rollouts.given import given_completions
from alignment_modules.rollouts.limits import LIMITS, check_kept, limited_prompts
from alignment_modules.rollouts.parameters import SamplingOptions
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.rollouts.sampler import Completions, NonFiniteLogits
from alignment_modules.rollouts.seeds import Seeds
from alignment_modules.rollouts.statistics import group_statistics, length_statistics, reward_statistics, row_sums
from alignment_modules.rollouts.stopping import StopStrings
from alignment_modules.rollouts.words import token_columns


@dataclass
class Seen:
    """What of the last rollout people may want to look at.

    Attributes:
        batch: Its prompts.
        step: When it was made.
        draw: Which of several at this step.
        completions: Token ids without padding.
        texts: The same as text; None where nobody needed it.
        rewards: Of each reward by name.
        greedy_tokens: Tokens of the greedy completions that were made beside them.
        episodes: The same as messages, calls and results, of those that acted on environments.
        version: Which of the policies that were pushed to the engine made it; None: the engine has but one.
    """

    batch: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    draw: int = 0
    completions: list[list[int]] = field(default_factory=list)
    texts: list[str] | None = None
    rewards: dict[str, list[float]] = field(default_factory=dict)
    greedy_tokens: int = 0
    episodes: list[Episode] | None = None
    version: int | None = None


class Actor:
    """Completes prompts with an engine, judges the completions, and counts.

    A batch may bring its own `responses` with `response_mask`, `response_loss_mask`, `rewards`, `old_logprobs` and
    `greedy_rewards` (`check_given_rollout`): what it brings is neither sampled nor judged again.

    Args:
        engine: Makes the completions.
        rewards: Judges them.
        sampling: How they are drawn.
        num_generations: Completions of each prompt.
        codec: Tokens to text, and the stop tokens.
        seed: Seed of the samples. Each has its own, made of this seed, the step, the prompt's index and the sample's
            number, so that a rollout can be repeated alone.
        missing_eos_penalty: Taken from the reward of each completion that ends without a stop, 0 or more.
        episodes: Has completions of several turns made, on environments; None: they are of one turn.
    """

    def __init__(
        self,
        engine: Engine,
        rewards: RewardSet,
        sampling: SamplingOptions,
        num_generations: int,
        *,
        codec: Codec,
        seed: int = 0,
        missing_eos_penalty: float = 0.0,
        episodes: Episodes | None = None,
    ) -> None:
        self.engine, self.rewards, self.sampling = engine, rewards, sampling
        self.num_generations, self.codec, self.seed = num_generations, codec, seed
        self.missing_eos_penalty, self.episodes = missing_eos_penalty, episodes
        self.seen = Seen()
        self.statistics: dict[str, Statistic] = {}

    def roll_out(
        self, policy: nn.Module, batch: Mapping[str, Any], *, step: int, draw: int = 0, with_greedy: bool = False
    ) -> Rollout:
        """Completions of the batch's prompts with their rewards; `statistics` and `seen` tell more of them.

        Args:
            policy: Who writes.
            batch: Prompts, and what else `check_given_rollout` allows.
            step: Counter of rollouts: the optimizer steps taken so far.
            draw: Which of several rollouts at this step, from 0.
            with_greedy: Whether one greedy completion of each prompt is made and judged, too.

        Raises:
            RewardError: If a reward fails; it names the reward and the optimizer step.
            ValueError: If the policy's logits are not finite, or the number of responses does not fit the prompts.
        """
        completions = self._given(batch) if "responses" in batch else self.complete(policy, batch, step, draw=draw)
        ids, mask, truncated = completions.ids.cpu(), completions.mask.cpu(), completions.truncated.cpu()
        rows, batch = real_tokens(ids, mask), completions.prompted(batch)
        table, texts = self._judged(batch, rows, step, completions.episodes)
        rewards, prompt_mask = self.penalised(table.total, truncated), batch["prompt_attention_mask"].bool().cpu()
        group = len(rows) // len(prompt_mask)
        # Nothing predicts the first token after an empty prompt.
        first = (mask.cumsum(dim=-1) == 1) & ~prompt_mask.any(dim=1).repeat_interleave(group)[:, None]
        own = (mask if completions.own is None else completions.own.cpu()) & ~first
        sampled_logps = completions.token_logps.to(batch["prompts"].device)
        of_engine = {} if "responses" in batch else self.engine.statistics()
        self.seen = Seen(batch, step, draw, rows, texts, dict(zip(table.names, table.values.T.tolist(), strict=True)))
        if completions.episodes is not None:  # a text is an answer, and people look at everything
            self.seen.texts, self.seen.episodes = None, completions.episodes
        self.seen.version = self.engine.version() if of_engine else None
        self.statistics = {
            **of_engine,
            **reward_statistics(table.names, table.values, rewards, table.asked),
            **length_statistics(mask, truncated),
            **group_statistics(rewards.view(-1, group)),
            **by_source(row_sums(table.names, table.values, rewards.view(-1, group), mask), batch.get(SOURCES)),
            **_of_episodes(completions, batch),
        }
        greedy_rewards = self._greedy_rewards(policy, batch, step) if with_greedy else None
        return Rollout(
            prompt_ids=batch["prompts"].cpu(),
            prompt_mask=prompt_mask,
            group=group,
            ids=ids,
            mask=mask,
            own=own,
            trained=own,
            rewards=rewards,
            reward_values=table.values,
            turn_rewards=self._turn_rewards(completions.episodes, own, table),
            greedy_rewards=greedy_rewards,
            truncated=truncated,
            sampled_logps=sampled_logps,
            old_logps=sampled_logps if "old_logprobs" in batch else None,
            support=completions.support,
            source_name=batch.get(SOURCES),
            source_weights=batch.get("source_weights"),
        )

    def complete(
        self,
        policy: nn.Module,
        batch: Mapping[str, Any],
        step: int,
        *,
        draw: int = 0,
        greedy: bool = False,
        compared: bool = False,
    ) -> Completions:
        """Samples `num_generations` completions of each prompt; greedily one.

        Args:
            policy: Who writes.
            batch: Prompts.
            step: Counter of rollouts.
            draw: Which of several rollouts at this step.
            greedy: Whether the likeliest tokens are taken.
            compared: Whether they are compared with those of other steps: environments then begin the same each time.

        Raises:
            NonFiniteLogits: If the policy's logits are not finite; it names the step.
            EngineError: If the engine gives none; it names the step.
        """
        parameters = self.sampling.parameters(greedy=greedy, stop_token_ids=self.codec.stop_token_ids)
        num_samples = 1 if greedy else self.num_generations
        seeds = Seeds(prompt_indices(batch), self.seed, step, draw)
        try:
            self.engine.push(policy)
            if self.episodes is not None:
                given = replace(seeds, step=0, draw=0) if compared else seeds
                options: Any = {"num_samples": num_samples, "seeds": given}
                completions = self.episodes.run(policy, self.engine, batch, parameters, **options)
            else:
                prompts = limited_prompts(batch)
                completions = self.engine.generate(prompts, parameters, num_samples=num_samples, seeds=seeds)
            check_kept(completions, batch.get(LIMITS), type(self.engine).__name__)
        except (NonFiniteLogits, EngineError) as error:
            raise type(error)(f"optimizer step {step + 1}: {error}") from error
        if parameters.truncates_support and completions.support is None:
            warnings.warn(
                f"{type(self.engine).__name__} does not tell what top_p={parameters.top_p:g}, "
                f"top_k={parameters.top_k}, min_p={parameters.min_p:g} kept: the policy is scored over the whole "
                "vocabulary, which these completions were not drawn from, and its ratio to them is off by the mass "
                "that was kept",
                stacklevel=2,
            )
        return completions

    def judge(self, batch: Mapping[str, Any], completions: Completions) -> dict[str, Statistic]:
        """What the rewards say of one completion of each prompt."""
        rows = real_tokens(completions.ids, completions.mask)
        table = self._table(completions.prompted(batch), rows, completions.episodes)[0]
        total = self.penalised(table.total, completions.truncated.cpu())
        reward = Statistic(total.nansum(), (~total.isnan()).sum())
        statistics = reward_statistics(table.names, table.values, total, table.asked)
        sums = row_sums(table.names, table.values, total[:, None], completions.mask)
        return {
            "reward": reward,
            **statistics,
            **length_statistics(completions.mask, completions.truncated),
            **by_source(sums, batch.get(SOURCES)),
            **_of_episodes(completions, batch),
        }

    def penalised(self, rewards: Tensor, truncated: Tensor) -> Tensor:
        """Rewards [completions] float32, less the penalty where a completion ends without a stop.

        Args:
            rewards: [completions]; NaN: not judged.
            truncated: [completions] bool.

        Raises:
            ValueError: If there is a penalty and nothing stops a completion.
        """
        if not self.missing_eos_penalty:
            return rewards.float()
        if not self.codec.stop_token_ids and not self.sampling.stop_strings:
            raise ValueError(
                f"missing_eos_penalty={self.missing_eos_penalty} needs a tokenizer: without stop tokens every "
                "completion is truncated"
            )
        return rewards.float() - self.missing_eos_penalty * truncated

    def rows(self, rollout: Rollout | None, first: int | None = None) -> dict[str, list[Any]]:
        """The last rollout in words: a list a column, with an entry a completion; empty before the first.

        Args:
            rollout: The one that `roll_out` gave last, with its advantages; None: there was none.
            first: Only so many completions, with more said of each: `messages` (where the data set gave the prompt as
                such), the columns of `token_columns`, and of an episode its messages. None: all, without.
        """
        if rollout is None:
            return {}
        seen, readable = self.seen, self.codec.tokenizer is not None
        when = f"{seen.step}.{seen.draw}" if seen.draw else str(seen.step)
        prompts = self.codec.seen_prompts(seen.batch) if readable else [""] * len(rollout)
        columns: dict[str, list[Any]] = {
            "id": [f"{when}/{index}/{g}" for index in prompt_indices(seen.batch) for g in range(rollout.group)],
            "prompt": _repeat(prompts, rollout.group),
            "completion": seen.texts or (self.codec.decode(seen.completions) if readable else [""] * len(rollout.ids)),
            **({"source": _repeat(seen.batch[SOURCES], rollout.group)} if SOURCES in seen.batch else {}),
            **seen.rewards,
            "reward": rollout.rewards.tolist(),
            "truncated": rollout.truncated.tolist(),
        }
        if seen.version is not None:
            columns["engine_version"] = [seen.version] * len(rollout.ids)
        if rollout.advantages is not None and rollout.advantages.dim() == 1:
            columns["advantage"] = rollout.advantages.tolist()
        if first is not None and (messages := messages_of(seen.batch)) is not None:
            columns["messages"] = _repeat(messages, rollout.group)
        if seen.episodes is not None:
            columns |= episode_columns(seen.episodes, whole=first is not None)
        if first is None:
            return columns
        cut = {name: values[:first] for name, values in columns.items()}
        values = {
            "sampled_logps": rollout.sampled_logps,
            # where it is what the engine told, it says nothing more
            "old_logps": None if rollout.old_logps is rollout.sampled_logps else rollout.old_logps,
            "reference_logps": rollout.reference_logps,
            "advantages": rollout.advantages if "advantage" not in columns else None,
        }
        tables = {name: None if table is None else table[:first] for name, table in values.items()}
        return cut | token_columns(self.codec, rollout.ids[:first], rollout.mask[:first], rollout.own[:first], tables)

    def _judged(
        self, batch: Mapping[str, Any], rows: list[list[int]], step: int, episodes: list[Episode] | None = None
    ) -> tuple[RewardTable, list[str] | None]:
        """The rewards that the batch brings, or those of the functions and the texts that they judged."""
        given = batch.get("rewards")
        if isinstance(given, Tensor):  # a list is a column of the data set
            if given.dim() == 2:
                return self.rewards.table(given.cpu()), None
            return RewardTable(("given",), given.view(-1, 1).float().cpu(), given.float().cpu()), None
        try:
            return self._table(batch, rows, episodes)
        except RewardError as error:
            raise RewardError(f"optimizer step {step + 1}: {error}") from error

    def _table(
        self, batch: Mapping[str, Any], rows: list[list[int]], episodes: list[Episode] | None
    ) -> tuple[RewardTable, list[str]]:
        """The rewards of completions, each of those that the batch's rows name it for, and the texts."""
        return judge(self.rewards, self.codec, batch, rows, batch.get(REWARD_NAMES), episodes)

    def _turn_rewards(self, episodes: list[Episode] | None, own: Tensor, table: RewardTable) -> Tensor | None:
        """[N, T] float32, the part of the rewards that environments gave for single turns; None where none does."""
        if episodes is None or self.episodes is None or not self.episodes.environments.judges_turns:
            return None
        column = next(n for n, one in enumerate(self.rewards.functions) if isinstance(one, EnvironmentReward))
        placed = self.rewards.weights[column] * placed_turn_rewards(episodes, own)
        unjudged = (table.values[:, column].isnan() | table.total.isnan()).to(placed.device)
        return placed.masked_fill(unjudged[:, None], 0.0)

    def _greedy_rewards(self, policy: nn.Module, batch: Mapping[str, Any], step: int) -> Tensor:
        """[prompts] float32: given, or of one greedy completion of each prompt, which is counted and told of."""
        given = batch.get("greedy_rewards")
        if isinstance(given, Tensor):
            rewards = given.float().cpu()
        else:
            greedy = self.complete(policy, batch, step, greedy=True)
            try:
                rows = real_tokens(greedy.ids, greedy.mask)
                table, _ = self._table(greedy.prompted(batch), rows, greedy.episodes)
            except RewardError as error:
                raise RewardError(f"optimizer step {step + 1}, greedy completions: {error}") from error
            rewards, lengths = self.penalised(table.total, greedy.truncated.cpu()), greedy.mask.sum(dim=1).float()
            self.seen.greedy_tokens = int(lengths.sum())
            self.statistics["greedy/mean_length"] = Statistic(lengths.sum(), float(len(lengths)))
        self.statistics["greedy/reward"] = Statistic(rewards.nansum(), (~rewards.isnan()).sum())
        return rewards

    def _given(self, batch: Mapping[str, Any]) -> Completions:
        strings = StopStrings(self.sampling.stop_strings, self.codec.tokenizer) if self.sampling.stop_strings else None
        return given_completions(batch, self.codec.stop_token_ids, strings)


def judge(
    rewards: RewardSet,
    codec: Codec,
    batch: Mapping[str, Any],
    completions: list[list[int]],
    judges: Sequence[Sequence[str] | None] | None = None,
    episodes: Sequence[Episode] | None = None,
) -> tuple[RewardTable, list[str]]:
    """Scores completions, given as token ids without padding; returns the table of rewards and the texts.

    The text of an episode is its answer. One whose environment failed is not judged.

    Args:
        rewards: Who judges.
        codec: Tokens to text.
        batch: The prompts, with their columns.
        completions: A prompt's are neighbours.
        judges: As in `RewardSet.__call__`.
        episodes: One a completion, where they acted on environments.

    Raises:
        RewardError: If a reward fails.
    """
    texts = codec.decode(completions) if episodes is None else [episode.answer for episode in episodes]
    table = rewards.to(batch["prompts"].device)(
        prompts=codec.prompts(batch),
        completions=texts,
        prompt_ids=real_tokens(batch["prompts"], batch["prompt_attention_mask"]),
        completion_ids=completions,
        columns=columns_of(batch) if episodes is None else {**columns_of(batch), "episodes": episodes},
        judges=judges,
    )
    if episodes is not None:
        table = replace(table, total=table.total.masked_fill(failed(episodes).to(table.total.device), torch.nan))
    return table, texts


def _of_episodes(completions: Completions, batch: Mapping[str, Any]) -> dict[str, Statistic]:
    """What is told of completions of several turns; nothing of others."""
    if completions.episodes is None:
        return {}
    return episode_statistics(completions.episodes, sources=batch.get(SOURCES))


def _repeat(values: list[Any], times: int) -> list[Any]:
    return [value for value in values for _ in range(times)]
