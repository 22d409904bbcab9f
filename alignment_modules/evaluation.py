"""Generation for `test` and `predict`: greedy exact match, pass@k, and completions as rows.

Every paradigm inherits these two steps, so that a pretrained, an instruction-tuned and an aligned policy are measured
by the same code. They need batches of prompts (`prompts` [batch, time] and `prompt_attention_mask`); a test batch
without prompts is measured by the module's own objective instead.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from alignment_modules.objective import Meters, Objective, Statistic
from alignment_modules.rewards import ExactMatch, RewardSet, RewardTable
from alignment_modules.rollouts import Completions, SamplingParameters, sample


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
            None: exact match with the column `answer`.
        seed: Seed of the samples.
    """

    max_completion_length: int = 256
    num_samples: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_strings: list[str] = field(default_factory=list)
    verifier: str | Callable | None = None
    seed: int = 0


class GenerationSteps(L.LightningModule):
    """`test_step` and `predict_step` of every paradigm, and the generation and judging they share with online RL."""

    policy: nn.Module
    tokenizer: Any
    evaluation: EvaluationConfig
    _eval_meters: Meters

    def objective(self, batch: dict[str, Any]) -> Objective:
        """The paradigm's objective."""
        raise NotImplementedError

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Adds one batch of prompts to `test/exact_match`, `test/pass@k` and the lengths."""
        if "prompts" not in batch:
            self._eval_meters.update(self.objective(batch).statistics)
            return
        config, verifier = self.evaluation, RewardSet([self.evaluation.verifier or ExactMatch()])
        greedy = self.generate(batch, self.evaluation_parameters(greedy=True), seed=config.seed)
        table, _ = self.judge(verifier, batch, greedy, 1)
        self._eval_meters.update({"exact_match": _mean(_correct(table)), **length_statistics(greedy)})
        if config.num_samples:
            samples = self.generate(
                batch, self.evaluation_parameters(), num_samples=config.num_samples, seed=config.seed
            )
            table, _ = self.judge(verifier, batch, samples, config.num_samples)
            correct = _correct(table).view(-1, config.num_samples)
            self._eval_meters.update(
                {
                    f"pass@{config.num_samples}": _mean(correct.amax(dim=1)),
                    "sample_accuracy": _mean(correct),
                }
            )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Rows for a JSONL file: the prompt's columns, and `completion`, or `completions` with their `rewards`."""
        if "prompts" not in batch:
            raise ValueError(f"predict needs batches of prompts (key 'prompts'); this one has {sorted(batch)}")
        config, samples = self.evaluation, max(self.evaluation.num_samples, 1)
        completions = self.generate(
            batch, self.evaluation_parameters(greedy=not config.num_samples), num_samples=samples, seed=config.seed
        )
        texts = self.decode(completions)
        rows: list[dict[str, Any]] = [{"index": index} for index in batch["index"]] if "index" in batch else []
        columns = _columns(batch) | {"prompt": prompt_texts(self.tokenizer, batch)}
        rows = rows or [{} for _ in columns["prompt"]]
        for number, row in enumerate(rows):
            row.update({name: values[number] for name, values in columns.items()})
            own = texts[number * samples : (number + 1) * samples]
            row.update({"completions": own} if config.num_samples else {"completion": own[0]})
        if config.num_samples and (config.verifier or "answer" in columns):
            table, _ = self.judge(RewardSet([config.verifier or ExactMatch()]), batch, completions, samples)
            for row, rewards in zip(rows, table.total.view(-1, samples).tolist(), strict=True):
                row["rewards"] = rewards
        return rows

    def generate(
        self,
        batch: Mapping[str, Any],
        parameters: SamplingParameters,
        *,
        num_samples: int = 1,
        seed: int = 0,
        step: int = 0,
    ) -> Completions:
        """Completions of a batch of prompts, sampled in eval mode; the policy's own modes are put back after."""
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
                prompt_indices=batch.get("index"),
                pad_token_id=pad_token_id(self.tokenizer),
                tokenizer=self.tokenizer,
            )

    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: end-of-sequence tokens of tokenizer and policy, and the data's end of turn."""
        configured = getattr(getattr(self.policy, "generation_config", None), "eos_token_id", None)
        found = configured if isinstance(configured, list) else [configured]
        found = [*found, getattr(self.tokenizer, "eos_token_id", None)]
        datamodule = getattr(self._trainer, "datamodule", None)
        found.extend(getattr(datamodule, "stop_token_ids", ()))
        return tuple(sorted({int(token) for token in found if token is not None}))

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
        columns = {name: _repeat(values, num_samples) for name, values in _columns(batch).items() if name != "prompt"}
        table = rewards(
            prompts=_repeat(prompt_texts(self.tokenizer, batch), num_samples),
            completions=texts,
            prompt_ids=_repeat(prompt_ids, num_samples),
            completion_ids=completion_ids,
            columns=columns,
        )
        return table, texts

    def decode(self, completions: Completions) -> list[str]:
        """The completions as text, without special tokens."""
        ids, mask = completions.ids.cpu(), completions.mask.cpu()
        return self.tokenizer.batch_decode(
            [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)], skip_special_tokens=True
        )

    def evaluation_parameters(self, greedy: bool = False) -> SamplingParameters:
        """How `test` and `predict` sample."""
        config = self.evaluation
        filters = {} if greedy else {"top_p": config.top_p, "top_k": config.top_k, "min_p": config.min_p}
        return SamplingParameters(
            max_completion_length=config.max_completion_length,
            temperature=1.0 if greedy else config.temperature,
            greedy=greedy,
            stop_token_ids=self.stop_token_ids(),
            stop_strings=tuple(config.stop_strings),
            **filters,  # type: ignore[arg-type]
        )


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills empty places; masks decide what counts, so any id serves."""
    found = getattr(tokenizer, "pad_token_id", None)
    return int(found) if found is not None else 0


def prompt_texts(tokenizer: Any, batch: Mapping[str, Any]) -> list[Any]:
    """The prompts as the dataset gave them (column `prompt`), else decoded with their special tokens."""
    if isinstance(batch.get("prompt"), list):
        return batch["prompt"]
    ids, mask = batch["prompts"].cpu(), batch["prompt_attention_mask"].cpu().bool()
    return tokenizer.batch_decode([row[kept].tolist() for row, kept in zip(ids, mask, strict=True)])


def length_statistics(completions: Completions) -> dict[str, Statistic]:
    """Completion lengths in tokens, of all and of those that stopped by themselves, and the share that did not."""
    lengths = completions.mask.sum(dim=1).float()
    ended = ~completions.truncated
    infinity = torch.full_like(lengths, torch.inf)
    count = torch.tensor(float(len(lengths)))
    return {
        "completions/mean_length": Statistic(lengths.sum(), count),
        "completions/min_length": Statistic(lengths.min(), kind="min"),
        "completions/max_length": Statistic(lengths.max(), kind="max"),
        "completions/mean_terminated_length": Statistic((lengths * ended).sum(), ended.sum()),
        "completions/min_terminated_length": Statistic(torch.where(ended, lengths, infinity).min(), kind="min"),
        "completions/max_terminated_length": Statistic(torch.where(ended, lengths, -infinity).max(), kind="max"),
        "completions/clipped_ratio": Statistic(completions.truncated.float().sum(), count),
    }


def _mean(values: Tensor) -> Statistic:
    return Statistic(values.sum(), float(values.numel()))


def _correct(table: RewardTable) -> Tensor:
    return (table.total >= 1.0).double()


def _columns(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: values for name, values in batch.items() if isinstance(values, list) and name != "index"}


def _repeat(values: list[Any], times: int) -> list[Any]:
    return [value for value in values for _ in range(times)]
