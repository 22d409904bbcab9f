"""Generation for `test`, `predict` and validation: greedy exact match, pass@k, and completions as rows.

A pretrained, an instruction-tuned and an aligned policy are measured by the same code, on batches of prompts (`prompts`
[batch, time] and `prompt_attention_mask`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from alignment_modules.evaluation.config import EvaluationConfig
from alignment_modules.evaluation.metrics import pass_at_k
from alignment_modules.evaluation.text import TextPrompts, complete_text
from alignment_modules.functional.sources import SOURCES, by_source
from alignment_modules.functional.statistics import RowSums, Statistic
from alignment_modules.rewards import ExactMatch, RewardError, RewardSet
from alignment_modules.rollouts import Completions, SamplingParameters
from alignment_modules.rollouts.actor import judge
from alignment_modules.rollouts.codec import (
    Codec,
    columns_of,
    messages_of,
    prompt_indices,
    rank_and_world_size,
    real_tokens,
)
from alignment_modules.rollouts.engines import Engine
from alignment_modules.rollouts.environments.loop import Episodes
from alignment_modules.rollouts.environments.making import make_episodes
from alignment_modules.rollouts.environments.rewards import EnvironmentReward
from alignment_modules.rollouts.environments.showing import episode_columns, episode_row
from alignment_modules.rollouts.environments.statistics import episode_statistics
from alignment_modules.rollouts.limits import check_kept, check_limits, limited_prompts
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.seeds import Seeds
from alignment_modules.rollouts.statistics import length_statistics
from alignment_modules.rollouts.words import token_columns


@dataclass(frozen=True)
class Measured:
    """What was measured of a batch of prompts.

    Attributes:
        statistics: Sums with their weights, by name.
        rows: For each prompt its `index`, columns and `prompt`; `completion` and `reward` (None where the verifier does
            not apply); with samples also `completions` and `rewards`. Of episodes as `predict` gives them.
    """

    statistics: dict[str, Statistic]
    rows: list[dict[str, Any]]


class Evaluator:
    """Measures a policy by what it writes.

    Args:
        engine: Makes the completions.
        config: How completions are drawn and how many, and the verifier: one is right when it gives 1 or more.
        codec: Tokens to text, and the stop tokens.

    Raises:
        ValueError: If the verifier cannot be found or called.
    """

    def __init__(self, engine: Engine, config: EvaluationConfig, *, codec: Codec) -> None:
        self.engine, self.config, self.codec = engine, config, codec
        self.verifier = RewardSet([config.verifier or ExactMatch()], option="evaluation.verifier")
        self.episodes: Episodes | None = None
        acts = ("environments", "tools", "max_turns", "max_tool_calls", "tool_options")
        options = {name: getattr(config, name) for name in acts}
        if (episodes := make_episodes(codec=codec, option=config.option, **options)) is not None:
            self.act_on(episodes)
        self._told = False
        self.restart()

    def act_on(self, episodes: Episodes) -> None:
        """Has the policy act from now on; where nothing else is to verify, rewards of the environments do.

        Args:
            episodes: With what it acts on.
        """
        self.episodes = episodes
        if self.config.verifier is None and episodes.environments.judges:
            self.verifier = RewardSet([EnvironmentReward()])

    def restart(self) -> None:
        """Counts prompts anew, at the start of an epoch."""
        self._prompts_seen = 0

    def judges(self, batch: Mapping[str, Any]) -> bool:
        """Whether the batch has the columns that the verifier asks for; where it has not, that is said once."""
        try:
            self._check_columns(batch)
        except RewardError as error:
            if not self._told:
                self._told = True
                rank_zero_info(f"completions are not judged: {error}")
            return False
        return True

    def test(self, policy: nn.Module, batch: Mapping[str, Any], greedy: Completions | None = None) -> Measured:
        """`exact_match`, `reward`, `pass@k` and the lengths over one batch of prompts, and the completions as rows.

        Args:
            policy: Who writes.
            batch: Prompts, with the columns that the verifier asks for.
            greedy: One completion of each prompt where there is one already.

        Raises:
            RewardError: If the batch lacks a column that the verifier asks for.
        """
        self._check_columns(batch)
        batch, config = self._indexed(batch), self.config
        if greedy is None:
            greedy = self.generate(policy, batch, self.parameters(greedy=True), seed=config.seed)
        reward, rows = self._judge(batch, greedy, self._rows(batch), "completion")
        own, applies, lengths = reward[:, 0], ~reward[:, 0].isnan(), greedy.mask.sum(dim=1)
        told = length_statistics(greedy.mask, greedy.truncated)
        told["frac_not_judged"] = Statistic((~applies).sum(), float(applies.numel()))
        sums = {
            "exact_match": RowSums((own >= 1.0).double(), applies),
            "reward": RowSums(own.nan_to_num(), applies),
            "completions/mean_length": RowSums(lengths, torch.ones_like(lengths)),
        }
        if config.num_samples:
            samples = self.generate(policy, batch, self.parameters(), num_samples=config.num_samples, seed=config.seed)
            reward, rows = self._judge(batch, samples, rows, "completions")
            correct, applies = (reward >= 1.0).double(), ~reward.isnan()
            sums[f"pass@{config.num_samples}"] = RowSums(pass_at_k(correct, config.num_samples), applies.any(dim=1))
            sums["sample_accuracy"] = RowSums(correct.sum(dim=1), applies.sum(dim=1))
        if greedy.episodes is not None:
            told |= episode_statistics(greedy.episodes, solved=own >= 1.0, sources=batch.get(SOURCES))
        means = {name: one.mean for name, one in sums.items()}
        return Measured(means | told | by_source(sums, batch.get(SOURCES)), rows)

    def predict(self, policy: nn.Module, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Rows for a JSONL file: the prompt's columns, and `completion`, or `completions` with their `rewards`.

        A reward is None where the verifier does not apply. Of episodes a row holds, in place of its completion, what
        `episode_row` says, and in place of `completions` a list of such as `episodes`.

        Raises:
            ValueError: If the batch has no prompts.
        """
        if "prompts" not in batch:
            raise ValueError(f"predict needs batches of prompts (key 'prompts'); this one has {sorted(batch)}")
        batch = self._indexed(batch)
        config, rows = self.config, self._rows(batch)
        name = "completions" if config.num_samples else "completion"
        parameters, samples = self.parameters(greedy=not config.num_samples), max(config.num_samples, 1)
        if config.num_samples and config.verifier:
            self._check_columns(batch)
        completions = self.generate(policy, batch, parameters, num_samples=samples, seed=config.seed)
        if config.num_samples and self.judges(batch):
            return self._judge(batch, completions, rows, name)[1]
        return self._written(rows, name, completions, self.decode(completions))

    def samples(self, policy: nn.Module, batch: Mapping[str, Any], step: int) -> dict[str, list[Any]]:
        """One greedy completion of each prompt, for people: a list a column, with an entry a completion.

        Args:
            policy: Who writes.
            batch: Prompts with their `index`; a `completion` of the data set's own is shown as `expected`.
            step: The optimizer step, for the ids.

        Returns:
            `id`, `prompt` as the policy saw it, `completion`, `truncated`, what `token_columns` says of each token, and
            of episodes what `episode_columns` does.
        """
        given = self.generate(policy, batch, self.parameters(greedy=True))
        columns: dict[str, list[Any]] = {
            "id": [f"{step}/{index}/0" for index in prompt_indices(batch)],
            "prompt": self.codec.seen_prompts(given.prompted(batch)),
            "completion": self.codec.decode(real_tokens(given.ids, given.mask)),
            "truncated": given.truncated.tolist(),
        }
        for name, values in (("messages", messages_of(batch)), ("expected", batch.get("completion"))):
            if values is not None:
                columns[name] = values
        if given.episodes is not None:
            columns |= episode_columns(given.episodes)
        values = {"sampled_logps": given.token_logps}
        return columns | token_columns(self.codec, given.ids, given.mask, given.own, values)

    def generate(
        self,
        policy: nn.Module,
        batch: Mapping[str, Any] | TextPrompts,
        parameters: SamplingParameters | None = None,
        *,
        num_samples: int = 1,
        seed: int = 0,
        step: int = 0,
    ) -> Any:
        """Completions of a batch of prompts; of text in text (`complete_text` says how).

        Raises:
            ValueError: If there is neither a tokenizer nor a stop token.
        """
        if isinstance(batch, (str, list)):
            return complete_text(self, policy, batch, parameters, num_samples=num_samples, seed=seed)
        check_limits(batch, len(batch["prompts"]))
        seeds = Seeds(prompt_indices(batch), seed, step)
        if self.episodes is not None:
            parameters = parameters or self.parameters(greedy=True)
            self.engine.push(policy)
            options: Any = {"num_samples": num_samples, "seeds": seeds}
            return self.episodes.run(policy, self.engine, batch, parameters, **options)
        return self.complete(policy, limited_prompts(batch), parameters, num_samples, seeds)

    def complete(
        self, policy: nn.Module, prompts: Prompts, parameters: SamplingParameters | None, num_samples: int, seeds: Seeds
    ) -> Completions:
        """Completions of prompts without padding.

        Raises:
            ValueError: If there is neither a tokenizer nor a stop token.
        """
        parameters = parameters or self.parameters(greedy=True)
        if self.codec.tokenizer is None and not parameters.stop_token_ids:
            raise ValueError("tokenizer=None: generation needs one to know where completions stop; give the module one")
        self.engine.push(policy)
        found = self.engine.generate(prompts, parameters, num_samples=num_samples, seeds=seeds)
        return check_kept(found, prompts.limits, type(self.engine).__name__)

    def parameters(self, *, greedy: bool = False) -> SamplingParameters:
        """How `test` and `predict` sample."""
        return self.config.parameters(greedy=greedy, stop_token_ids=self.codec.stop_token_ids)

    def decode(self, completions: Completions) -> list[str]:
        """The completions as text: without padding and the stop token, with all else, such as a special `<think>`.

        Of episodes it is their answers.
        """
        if completions.episodes is not None:
            return [episode.answer for episode in completions.episodes]
        return self.codec.decode(real_tokens(completions.ids, completions.mask))

    def _check_columns(self, batch: Mapping[str, Any]) -> None:
        """Checks that the batch has what the verifier asks for."""
        self.verifier.check_columns([*columns_of(batch), *(["episodes"] if self.episodes is not None else [])])

    def _rows(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What is known of each prompt: its index, the columns, and itself."""
        columns = {"index": batch["index"]} | columns_of(batch) | {"prompt": self.codec.prompts(batch)}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _judge(
        self, batch: Mapping[str, Any], completions: Completions, rows: list[dict[str, Any]], name: str
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """The verifier's value of each completion [prompts, samples], and the rows with both."""
        ids = real_tokens(completions.ids, completions.mask)
        given = completions.prompted(batch)
        table, texts = judge(self.verifier, self.codec, given, ids, episodes=completions.episodes)
        rewards = table.total.view(len(rows), -1)
        shown = [None if math.isnan(value) else value for value in table.total.tolist()]
        rows = self._written(rows, name, completions, texts)
        return rewards, _with(rows, name.replace("completion", "reward"), shown)

    def _written(
        self, rows: list[dict[str, Any]], name: str, completions: Completions, texts: list[str]
    ) -> list[dict[str, Any]]:
        """The rows with what was written: texts, or episodes with their messages."""
        if completions.episodes is None or self.episodes is None:
            return _with(rows, name, texts)
        schemas = self.episodes.environments.schemas
        told = [episode_row(one, schemas(one.environment)) for one in completions.episodes]
        return _with(rows, "episodes", told) if name == "completions" else list(map(_acted, rows, told))

    def _indexed(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch with an `index`: what it brings, else a running number, so that no batch size changes a sample."""
        if "index" in batch:
            return batch
        ranks = rank_and_world_size()[1]
        indices = [index + ranks * self._prompts_seen for index in prompt_indices(batch)]
        self._prompts_seen += len(indices)
        return {**batch, "index": indices}


def _acted(row: dict[str, Any], episode: dict[str, Any]) -> dict[str, Any]:
    """A row with its episode; a completion of the data set's own is what was expected, or it would be taken for it."""
    return {"expected" if name == "completion" else name: value for name, value in row.items()} | episode


def _with(rows: list[dict[str, Any]], name: str, values: list[Any]) -> list[dict[str, Any]]:
    """Rows with one more entry each: a value, or where the name is a plural a list of as many as each row has."""
    if name.endswith("s"):
        size = len(values) // len(rows)
        values = [values[start : start + size] for start in range(0, len(values), size)]
    return [row | {name: value} for row, value in zip(rows, values, strict=True)]
