"""Generation for `test` and `predict`: greedy exact match, pass@k, and completions as rows.

Every paradigm inherits these two steps, so that a pretrained, an instruction-tuned and an aligned policy are measured
by the same code. They need batches of prompts (`prompts` [batch, time] and `prompt_attention_mask`); a test batch
without prompts is measured by the module's own objective instead.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, overload

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from alignment_modules.functional.ranges import Count, Natural, Positive, Range, Seed, Share, check_options
from alignment_modules.metrics import pass_at_k
from alignment_modules.objective import Meters, Objective, Statistic
from alignment_modules.policies.architecture import own_stop_ids
from alignment_modules.policies.load import vocabulary_size
from alignment_modules.policies.modes import eval_mode
from alignment_modules.rewards import RewardSet, RewardTable
from alignment_modules.rollouts import Completions, SamplingParameters, sample
from alignment_modules.text_generation import TextPrompts, generate_text


@dataclass
class EvaluationConfig:
    """How `test` and `predict` generate and judge completions.

    Args:
        max_completion_length: Longest completion, in tokens.
        num_samples: Completions sampled for each prompt, beside the greedy one. `test` reports pass@num_samples;
            `predict` writes the samples, scored by the verifier where its column is there. 0: greedy only.
        temperature: Temperature of the samples.
        top_p: Nucleus size of the samples.
        top_k: Number of likeliest tokens kept for the samples; 0 keeps all.
        min_p: Tokens less likely than this share of the likeliest are dropped; 0 keeps all.
        stop_strings: Completions also end with these strings.
        verifier: A reward, or the import path of one: a completion is correct when it gives 1 or more.
            None: exact match with the column `answer`. Where it does not apply (None, NaN), a completion is not
            counted, but in `frac_not_judged`.
        seed: Seed of the samples.

    Raises:
        ValueError: If a value is outside its range.
    """

    max_completion_length: Count = 256
    num_samples: Natural = 0
    temperature: Positive = 1.0
    top_p: Annotated[float, Range(0, 1, "(]")] = 1.0
    top_k: Natural = 0
    min_p: Share = 0.0
    stop_strings: list[str] = field(default_factory=list)
    verifier: str | Callable | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_options(EvaluationConfig, vars(self), "evaluation.")

    def parameters(self, *, greedy: bool = False, stop_token_ids: tuple[int, ...] = ()) -> SamplingParameters:
        """How completions are drawn, greedily or as samples."""
        filters = {} if greedy else {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return SamplingParameters(
            max_completion_length=self.max_completion_length,
            temperature=1.0 if greedy else self.temperature,
            greedy=greedy,
            stop_token_ids=stop_token_ids,
            stop_strings=tuple(self.stop_strings),
            **filters,  # type: ignore[arg-type]
        )


class GenerationSteps(L.LightningModule):
    """`test_step` and `predict_step` of every paradigm, and the generation and judging they share with online RL."""

    policy: nn.Module
    tokenizer: Any
    evaluation: EvaluationConfig
    verifier: RewardSet
    _eval_meters: dict[int, Meters]
    _prompts_seen: int = 0

    def objective(self, batch: dict[str, Any]) -> Objective:
        """The paradigm's objective."""
        raise NotImplementedError

    def extra_metrics(self, batch: dict[str, Any], objective: Objective) -> dict[str, Statistic]:
        """More statistics of a batch."""
        raise NotImplementedError

    def record_evaluation(self, statistics: Mapping[str, Statistic], dataloader_idx: int) -> None:
        """Adds statistics to the means of a validation or test loader."""
        self._eval_meters.setdefault(dataloader_idx, Meters()).update(statistics)

    def evaluate_objective(self, batch: dict[str, Any], dataloader_idx: int) -> None:
        """Adds a batch's objective to the means of a validation or test loader."""
        objective = self.objective(batch)
        self.record_evaluation(objective.statistics | self.extra_metrics(batch, objective), dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds one batch of prompts to `test/exact_match`, `test/pass@k` and the lengths."""
        if "prompts" not in batch:
            self.evaluate_objective(batch, dataloader_idx)
            return
        self.check_columns(self.verifier, batch)
        batch = self._indexed(batch)
        config = self.evaluation
        greedy = self.generate(batch, self.evaluation_parameters(greedy=True), seed=config.seed)
        correct, applies = self._correct(batch, greedy, 1)
        statistics = {
            "exact_match": Statistic(correct.sum(), applies.sum()),
            "frac_not_judged": Statistic((~applies).sum(), float(applies.numel())),
            **length_statistics(greedy),
        }
        if config.num_samples:
            samples = self.generate(
                batch, self.evaluation_parameters(), num_samples=config.num_samples, seed=config.seed
            )
            correct, applies = self._correct(batch, samples, config.num_samples)
            solved = pass_at_k(correct, config.num_samples)
            statistics[f"pass@{config.num_samples}"] = Statistic(solved.sum(), applies.any(dim=1).sum())
            statistics["sample_accuracy"] = Statistic(correct.sum(), applies.sum())
        self.record_evaluation(statistics, dataloader_idx)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Rows for a JSONL file: the prompt's columns, and `completion`, or `completions` with their `rewards`.

        A reward is None where the verifier does not apply.
        """
        if "prompts" not in batch:
            raise ValueError(f"predict needs batches of prompts (key 'prompts'); this one has {sorted(batch)}")
        batch = self._indexed(batch)
        config, samples = self.evaluation, max(self.evaluation.num_samples, 1)
        columns = _columns(batch) | {"prompt": given_prompts(self.tokenizer, batch)}
        scored = bool(config.num_samples and (config.verifier or "answer" in columns))
        if scored:
            self.check_columns(self.verifier, batch)
        elif config.num_samples and batch_idx == 0:
            rank_zero_info("predict: the rows have no column 'answer', so their completions are not scored")
        completions = self.generate(
            batch, self.evaluation_parameters(greedy=not config.num_samples), num_samples=samples, seed=config.seed
        )
        texts = self.decode(completions)
        rows: list[dict[str, Any]] = [{"index": index} for index in batch["index"]] if "index" in batch else []
        rows = rows or [{} for _ in columns["prompt"]]
        for number, row in enumerate(rows):
            row.update({name: values[number] for name, values in columns.items()})
            own = texts[number * samples : (number + 1) * samples]
            row.update({"completions": own} if config.num_samples else {"completion": own[0]})
        if scored:
            table, _ = self.judge(self.verifier, batch, completions, samples)
            for row, rewards in zip(rows, table.total.view(-1, samples).tolist(), strict=True):
                row["rewards"] = [None if math.isnan(reward) else reward for reward in rewards]
        return rows

    def _correct(self, batch: Mapping[str, Any], completions: Completions, samples: int) -> tuple[Tensor, Tensor]:
        """Whether each completion [prompts, samples] is right, and whether the verifier applies to it at all."""
        table, _ = self.judge(self.verifier, batch, completions, samples)
        total = table.total.view(-1, samples)
        return (total >= 1.0).double(), ~total.isnan()

    @overload
    def generate(
        self,
        batch: Mapping[str, Any],
        parameters: SamplingParameters,
        *,
        num_samples: int = 1,
        seed: int = 0,
        step: int = 0,
    ) -> Completions: ...

    @overload
    def generate(
        self, batch: TextPrompts, parameters: SamplingParameters | None = None, *, num_samples: int = 1, seed: int = 0
    ) -> Any: ...

    def generate(
        self,
        batch: Mapping[str, Any] | TextPrompts,
        parameters: SamplingParameters | None = None,
        *,
        num_samples: int = 1,
        seed: int = 0,
        step: int = 0,
    ) -> Any:
        """Completions of a batch of prompts, sampled in eval mode; the policy's own modes are put back after.

        For text it answers in text: `module.generate("1+1=")`, also for messages and for lists of either
        (`generate_text` says how).
        """
        if isinstance(batch, (str, list)):
            return generate_text(self, batch, parameters, num_samples=num_samples, seed=seed)
        if parameters is None:
            parameters = self.evaluation_parameters(greedy=True)
        if self.tokenizer is None and not parameters.stop_token_ids:
            raise ValueError("tokenizer=None: generation needs one to know where completions stop; give the module one")
        with eval_mode(self.policy):
            return sample(
                self.policy,
                batch["prompts"],
                batch["prompt_attention_mask"],
                parameters=parameters,
                num_samples=num_samples,
                seed=seed,
                step=step,
                prompt_indices=self.prompt_indices(batch),
                pad_token_id=pad_token_id(self.tokenizer),
                tokenizer=self.tokenizer,
            )

    def on_test_epoch_start(self) -> None:
        """Counts prompts anew."""
        self._prompts_seen = 0

    def on_predict_epoch_start(self) -> None:
        """Counts prompts anew."""
        self._prompts_seen = 0

    def _indexed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with an `index`: what it brings, else a running number, so that no batch size changes a sample."""
        if "index" in batch:
            return batch
        indices = [index + self._world_size() * self._prompts_seen for index in self.prompt_indices(batch)]
        self._prompts_seen += len(indices)
        return {**batch, "index": indices}

    def _world_size(self) -> int:
        return 1 if self._trainer is None else self._trainer.world_size

    def prompt_indices(self, batch: Mapping[str, Any]) -> list[int]:
        """What a prompt's samples are seeded with: its `index`, else its place in the batch, another on each rank."""
        if "index" in batch:
            return batch["index"]
        return [self.global_rank + self._world_size() * row for row in range(len(batch["prompts"]))]

    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: end-of-sequence tokens of tokenizer and policy, and the data's end of turn."""
        found: list[int | None] = [*own_stop_ids(self.policy, vocabulary_size(self.policy))]
        found.append(getattr(self.tokenizer, "eos_token_id", None))
        found.extend(self.data_stop_token_ids())
        return tuple(sorted({int(token) for token in found if token is not None}))

    def data_stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion in the data trained on, such as the chat template's end of turn."""
        return tuple(getattr(getattr(self._trainer, "datamodule", None), "stop_token_ids", ()))

    def check_columns(self, rewards: RewardSet, batch: Mapping[str, Any]) -> None:
        """Checks before anything is generated that the batch has the columns that the rewards ask for.

        Raises:
            RewardError: If one is missing.
        """
        rewards.check_columns(_columns(batch).keys())

    def judge(
        self, rewards: RewardSet, batch: Mapping[str, Any], completions: Completions, num_samples: int
    ) -> tuple[RewardTable, list[str]]:
        """Scores completions; returns the table of rewards and the completions' texts."""
        texts = self.decode(completions)
        prompt_ids = [
            row[mask.bool()].tolist()
            for row, mask in zip(batch["prompts"].cpu(), batch["prompt_attention_mask"].cpu(), strict=True)
        ]
        completion_ids = [
            row[mask].tolist() for row, mask in zip(completions.ids.cpu(), completions.mask.cpu(), strict=True)
        ]
        rewards.to(self.device)
        columns = {name: _repeat(values, num_samples) for name, values in _columns(batch).items()}
        table = rewards(
            prompts=_repeat(given_prompts(self.tokenizer, batch), num_samples),
            completions=texts,
            prompt_ids=_repeat(prompt_ids, num_samples),
            completion_ids=completion_ids,
            columns=columns,
        )
        return table, texts

    def decode(self, completions: Completions) -> list[str]:
        """The completions as text: without padding and the stop token, with all else, such as a special `<think>`."""
        ids, mask, stops = completions.ids.cpu(), completions.mask.cpu(), set(self.stop_token_ids())
        rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        for row in rows:
            while row and row[-1] in stops:
                row.pop()
        return self.tokenizer.batch_decode(rows, skip_special_tokens=False)

    def evaluation_parameters(self, greedy: bool = False) -> SamplingParameters:
        """How `test` and `predict` sample."""
        return self.evaluation.parameters(greedy=greedy, stop_token_ids=self.stop_token_ids())


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills empty places; masks decide what counts, so any id serves."""
    found = getattr(tokenizer, "pad_token_id", None)
    return int(found) if found is not None else 0


def given_prompts(tokenizer: Any, batch: Mapping[str, Any]) -> list[Any]:
    """The prompts as the data set gave them (column `prompt`: text or messages), else decoded."""
    if isinstance(batch.get("prompt"), list):
        return batch["prompt"]
    return prompt_texts(tokenizer, batch, skip_special_tokens=True)


def prompt_texts(tokenizer: Any, batch: Mapping[str, Any], *, skip_special_tokens: bool = False) -> list[str]:
    """The prompts as the policy saw them, decoded."""
    ids, mask = batch["prompts"].cpu(), batch["prompt_attention_mask"].cpu().bool()
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens)


def length_statistics(completions: Completions) -> dict[str, Statistic]:
    """Completion lengths in tokens, of all and of those that stopped by themselves, and the share that did not."""
    lengths = completions.mask.sum(dim=1).float()
    ended = ~completions.truncated
    infinity = torch.full_like(lengths, torch.inf)
    count = float(len(lengths))
    return {
        "completions/mean_length": Statistic(lengths.sum(), count),
        "completions/min_length": Statistic(lengths.min(), kind="min"),
        "completions/max_length": Statistic(lengths.max(), kind="max"),
        "completions/mean_terminated_length": Statistic((lengths * ended).sum(), ended.sum()),
        "completions/min_terminated_length": Statistic(torch.where(ended, lengths, infinity).min(), kind="min"),
        "completions/max_terminated_length": Statistic(torch.where(ended, lengths, -infinity).max(), kind="max"),
        "completions/clipped_ratio": Statistic(completions.truncated.float().sum(), count),
    }


def _columns(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: values for name, values in batch.items() if isinstance(values, list) and name != "index"}


def _repeat(values: list[Any], times: int) -> list[Any]:
    return [value for value in values for _ in range(times)]
