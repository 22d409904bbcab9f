"""What online paradigms share: sampling completions of the batch's prompts, judging them, and showing what came out."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor

from alignment_modules.evaluation import length_statistics, prompt_texts
from alignment_modules.functional.ranges import Count, Finite, Natural, Positive, Range, Seed, Share, check_options
from alignment_modules.objective import Statistic
from alignment_modules.rewards import RewardError, RewardSet
from alignment_modules.rollouts import Completions, NonFiniteLogits, SamplingParameters
from alignment_modules.rollouts.stopping import StopStrings
from alignment_modules.training.updates import UpdateModule


class OnlineModule(UpdateModule):
    """Base of paradigms that learn from their own samples.

    A batch may bring its own `responses` [batch * G, time] with `response_mask`, `rewards` [batch * G] and
    `old_logprobs` [batch * G, time]: what it brings is not sampled, judged or scored again.

    Args:
        rewards: Reward functions: objects, import paths, or folders of sequence-classification models.
        reward_weights: One weight a reward; None: all 1.
        num_generations: G, completions of each prompt.
        max_completion_length: Longest completion in tokens.
        temperature: Sampling temperature, more than 0; policy, old policy and reference are scored with the same.
        top_p: Nucleus size. Below 1 the samples no longer come from the scored distribution: the ratio is biased.
        top_k: Number of likeliest tokens kept; 0 keeps all. The same caution holds.
        min_p: Tokens below this share of the likeliest are dropped; 0 keeps all. The same caution holds.
        stop_strings: Completions also end with these strings.
        seed: Seed of the samples; None: the global seed. Each sample has its own, made of this seed, the optimizer
            step, the prompt's index and the sample's number, so that a rollout can be repeated alone.
        **common: Keywords of `UpdateModule` and `AlignmentModule`: max_grad_norm, policy, optimizer,
            lr_scheduler, tokenizer, evaluation.
    """

    compares_log_probs = True
    batch_keys = ("prompts", "prompt_attention_mask")

    def __init__(
        self,
        *,
        rewards: str | list[str | Callable] | Callable,
        reward_weights: list[Finite] | None = None,
        num_generations: Count = 8,
        max_completion_length: Count = 256,
        temperature: Positive = 1.0,
        top_p: Annotated[float, Range(0, 1, "(]")] = 1.0,
        top_k: Natural = 0,
        min_p: Share = 0.0,
        stop_strings: list[str] | None = None,
        seed: Seed | None = None,
        **common: Any,
    ) -> None:
        check_options(OnlineModule.__init__, locals())
        super().__init__(**common)
        self.rewards = RewardSet(rewards if isinstance(rewards, list) else [rewards], reward_weights)
        self.num_generations = num_generations
        self.sampling = SamplingParameters(
            max_completion_length=max_completion_length,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            stop_strings=tuple(stop_strings or ()),
        )
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.last_rollout: dict[str, list[Any]] = {}
        self._rollout_counts: dict[str, Tensor | int] | None = None

    def check_batch(self, batch: Any) -> None:
        """Also checks that what a batch brings of a rollout belongs together, and that the rewards' columns are there.

        Raises:
            ValueError: If a key or column is missing, or `rewards` or `old_logprobs` come without the `responses` they
                belong to.
        """
        super().check_batch(batch)
        check_given_rollout(batch)
        if not isinstance(batch.get("rewards"), Tensor):
            self.check_columns(self.rewards, batch)

    def count_tokens(self, batch: Mapping[str, Any]) -> dict[str, Tensor | int]:
        """What the last rollout holds: the prompts' and all completions' tokens, and the completions as samples."""
        return super().count_tokens(batch) if self._rollout_counts is None else self._rollout_counts

    def count_rollout(self, batch: Mapping[str, Any], completions: Completions) -> None:
        """Counts a rollout, for `num_tokens` and the throughput; prompts count once, however many samples they have."""
        masks = (batch["prompt_attention_mask"].bool(), completions.mask)
        tokens = masks[0].sum() + masks[1].sum()
        padding = sum(mask.numel() for mask in masks) - tokens
        self._rollout_counts = {"tokens": tokens, "samples": len(completions.ids), "padding": padding}
        self.window.tokens = self.window.tokens + tokens

    def sample_completions(self, batch: Mapping[str, Any]) -> Completions:
        """G completions of each prompt, row-major; the batch's own `responses` where it brings them.

        Raises:
            ValueError: If the policy's logits are not finite, or the number of responses does not fit the prompts.
        """
        parameters = self.rollout_parameters()
        if "responses" not in batch:
            try:
                return self.generate(
                    batch, parameters, num_samples=self.num_generations, seed=self.seed, step=self.global_step
                )
            except NonFiniteLogits as error:
                raise NonFiniteLogits(f"{self.this_step}: {error}") from error
        ids, mask = batch["responses"], batch["response_mask"].bool()
        prompts = len(batch["prompts"])
        if len(ids) % prompts or len(ids) < 2 * prompts:
            raise ValueError(
                f"responses has {len(ids)} rows for {prompts} prompts: it must have the same number of at least 2 "
                "completions for each prompt, grouped by prompt"
            )
        stops = torch.tensor(parameters.stop_token_ids or [-1], device=ids.device)
        old_logps = batch.get("old_logprobs", torch.full(ids.shape, torch.nan, device=ids.device)).float()
        stopped = (torch.isin(ids, stops) & mask).any(dim=1)
        if parameters.stop_strings:
            strings = StopStrings(parameters.stop_strings, self.tokenizer)
            ended = [strings.ends(row[kept].tolist()) for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]
            stopped = stopped | torch.tensor(ended, device=ids.device)
        return Completions(ids, mask, old_logps, ~stopped)

    def judge_completions(
        self, batch: Mapping[str, Any], completions: Completions
    ) -> tuple[Tensor, dict[str, Statistic]]:
        """Total reward of each completion [prompts, G], float32, and the statistics of each reward by name.

        NaN is the total of a completion that no reward applies to.

        Raises:
            RewardError: If a reward fails; it names the reward and the optimizer step.
        """
        prompts = len(batch["prompts"])
        group = len(completions.ids) // prompts
        given = batch.get("rewards")
        if isinstance(given, Tensor):  # a list is a column of the data set
            names, values, total, texts = ["given"], given.view(-1, 1).float(), given.float(), None
        else:
            try:
                table, texts = self.judge(self.rewards, batch, completions, group)
            except RewardError as error:
                raise RewardError(f"{self.this_step}: {error}") from error
            names, values, total = list(table.names), table.values, table.total
        total = total.to(self.device, torch.float32).view(prompts, group)
        self._remember(batch, completions, texts, dict(zip(names, values.T.tolist(), strict=True)), total)
        return total, reward_statistics(names, values, total) | length_statistics(completions)

    @property
    def this_step(self) -> str:
        """The optimizer step being prepared, as messages name it."""
        return f"optimizer step {self.global_step + 1}"

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Judges one greedy completion of each prompt."""
        completions = self.generate(batch, self.rollout_parameters(greedy=True))
        table, _ = self.judge(self.rewards, batch, completions, 1)
        reward = Statistic(table.total.nansum(), (~table.total.isnan()).sum())
        statistics = reward_statistics(list(table.names), table.values, table.total) | length_statistics(completions)
        self.record_evaluation({"reward": reward, **statistics}, dataloader_idx)

    def rollout_parameters(self, greedy: bool = False) -> SamplingParameters:
        """How rollouts (greedy: validation completions) are sampled."""
        filters: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0} if greedy else {}
        return replace(self.sampling, greedy=greedy, stop_token_ids=self.stop_token_ids(), **filters)

    def _remember(
        self,
        batch: Mapping[str, Any],
        completions: Completions,
        texts: list[str] | None,
        rewards: dict[str, list[float]],
        total: Tensor,
    ) -> None:
        """Keeps this rollout in words, for sample tables."""
        prompts, group = total.shape
        indices = self.prompt_indices(batch)
        decodable = self.tokenizer is not None
        shown = prompt_texts(self.tokenizer, batch) if decodable else [""] * prompts
        self.last_rollout = {
            "id": [f"{self.global_step}/{index}/{g}" for index in indices for g in range(group)],
            "prompt": [prompt for prompt in shown for _ in range(group)],
            "completion": texts or (self.decode(completions) if decodable else [""] * (prompts * group)),
            **rewards,
            "reward": total.flatten().tolist(),
            "truncated": completions.truncated.tolist(),
        }


def check_given_rollout(batch: Mapping[str, Any]) -> None:
    """Checks the part of a rollout that a batch brings: `responses`, `response_mask`, `rewards`, `old_logprobs`.

    Raises:
        ValueError: If a part is missing, of another shape than the responses, or too coarse to compare with.
    """
    if "responses" in batch:
        needs, those = "response_mask", ["responses"]
    else:
        needs, those = "responses", [k for k in ("rewards", "old_logprobs") if isinstance(batch.get(k), Tensor)]
    if those and needs not in batch:
        raise ValueError(
            f"the batch brings {' and '.join(those)} without {needs}: completions that are given come as responses "
            "and response_mask, with or without their rewards and old_logprobs"
        )
    if not those:
        return
    rows, time = batch["responses"].shape
    shapes = {"response_mask": (rows, time), "old_logprobs": (rows, time), "rewards": (rows,)}
    for name, shape in shapes.items():
        given = batch.get(name)
        if isinstance(given, Tensor) and tuple(given.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; for responses {(rows, time)} it must be {shape}")
    if not time:
        raise ValueError("responses has no column: completions have at least one token")
    old = batch.get("old_logprobs")
    if old is not None and old.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"old_logprobs is {old.dtype}, too coarse for a ratio: give it in float32. Trainer(precision='bf16-true') "
            "rounds all of a batch; train with precision='bf16-mixed' or PolicyConfig(dtype='bfloat16') instead"
        )


def reward_statistics(names: list[str], values: Tensor, total: Tensor) -> dict[str, Statistic]:
    """Mean and standard deviation of each reward over the completions it applies to, and the share of the others.

    Args:
        names: One name a reward.
        values: [completions, rewards] float; NaN: not applicable.
        total: The totals of all completions, of any shape; NaN: no reward applies.
    """
    statistics = {"frac_not_judged": Statistic(total.isnan().sum(), float(total.numel()))}
    for name, column in zip(names, values.unbind(dim=1), strict=True):
        applies = ~column.isnan()
        count, exact = applies.sum(), column.double()
        statistics[f"rewards/{name}/mean"] = Statistic(exact.nansum(), count)
        statistics[f"rewards/{name}/std"] = Statistic(
            torch.stack([exact.nansum(), exact.square().nansum()]), count, kind="std"
        )
        statistics[f"rewards/{name}/not_applicable"] = Statistic((~applies).sum(), float(len(column)))
    return statistics
