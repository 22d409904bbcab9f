"""What is logged of completions and their rewards, as sums that stay exact under any split."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from alignment_modules.functional.advantages import informative_groups
from alignment_modules.functional.kl import MAX_LOG_RATIO
from alignment_modules.functional.statistics import RowSums, Statistic


def length_statistics(mask: Tensor, truncated: Tensor) -> dict[str, Statistic]:
    """Completion lengths in tokens, of all and of those that stopped by themselves, and the share that did not.

    The same names where there is no completion: other processes may have some.

    Args:
        mask: [completions, time] bool.
        truncated: [completions] bool.
    """
    lengths = mask.sum(dim=1).float()
    ended = ~truncated
    infinity, nothing = torch.full_like(lengths, torch.inf), lengths.new_full((1,), torch.inf)
    count = float(len(lengths))

    def least(values: Tensor) -> Tensor:
        return torch.cat((values, nothing)).min()

    def most(values: Tensor) -> Tensor:
        return -least(-values)

    return {
        "completions/mean_length": Statistic(lengths.sum(), count),
        "completions/min_length": Statistic(least(lengths), kind="min"),
        "completions/max_length": Statistic(most(lengths), kind="max"),
        "completions/mean_terminated_length": Statistic((lengths * ended).sum(), ended.sum()),
        "completions/min_terminated_length": Statistic(least(torch.where(ended, lengths, infinity)), kind="min"),
        "completions/max_terminated_length": Statistic(most(torch.where(ended, lengths, -infinity)), kind="max"),
        "completions/clipped_ratio": Statistic(truncated.float().sum(), count),
    }


def reward_statistics(
    names: Sequence[str], values: Tensor, total: Tensor, asked: Tensor | None = None
) -> dict[str, Statistic]:
    """Mean and standard deviation of each reward over the completions it applies to, and the share of the others.

    The share is of those that the reward was asked about.

    Args:
        names: One name a reward.
        values: [completions, rewards] float; NaN: not applicable.
        total: The totals of all completions, of any shape; NaN: no reward applies.
        asked: [completions, rewards] bool, on the host: which completions each reward was to judge; None: all.
    """
    asked = torch.ones(values.shape, dtype=torch.bool) if asked is None else asked
    statistics = {"frac_not_judged": Statistic(total.isnan().sum(), float(total.numel()))}
    for name, column, own in zip(names, values.unbind(dim=1), asked.unbind(dim=1), strict=True):
        applies = ~column.isnan()
        count, exact = applies.sum(), column.double()
        statistics[f"rewards/{name}/mean"] = Statistic(exact.nansum(), count)
        statistics[f"rewards/{name}/std"] = Statistic(
            torch.stack([exact.nansum(), exact.square().nansum()]), count, kind="std"
        )
        statistics[f"rewards/{name}/not_applicable"] = Statistic((~applies & own).sum(), own.sum())
    return statistics


def group_statistics(rewards: Tensor) -> dict[str, Statistic]:
    """Mean and spread of the groups' rewards; of single completions the mean alone.

    Args:
        rewards: [prompts, group] float; NaN stands for a reward that does not apply.
    """
    applies = ~rewards.isnan()
    count = applies.sum(dim=1)
    mean = rewards.nansum(dim=1) / count.clamp(min=1)
    squares = torch.where(applies, (rewards - mean[:, None]).square(), 0.0).sum(dim=1)
    groups = (count > 0).sum()
    reward = {"reward": Statistic(mean.sum(), groups)}
    if rewards.shape[1] == 1:  # one completion of a prompt is compared with none
        return reward
    informative = informative_groups(rewards).sum()
    return reward | {
        "reward_std": Statistic((squares / (count - 1).clamp(min=1)).sqrt().sum(), groups),
        "frac_reward_zero_std": Statistic(groups - informative, groups),
        "groups_with_signal": Statistic(informative, groups),
    }


def row_sums(names: Sequence[str], values: Tensor, rewards: Tensor, mask: Tensor) -> dict[str, RowSums]:
    """What is told of completions and their rewards of each source by itself.

    Args:
        names: One name a reward.
        values: [completions, rewards] float; NaN: not applicable.
        rewards: [prompts, group] float, the totals; NaN: no reward applies.
        mask: [completions, time] bool.
    """
    applies, lengths = ~rewards.isnan(), mask.sum(dim=1)
    count = applies.sum(dim=1)
    found = {
        "reward": RowSums(rewards.double().nansum(dim=1) / count.clamp(min=1), count > 0),
        "completions/mean_length": RowSums(lengths, torch.ones_like(lengths)),
    }
    if rewards.shape[1] > 1:
        found["groups_with_signal"] = RowSums(informative_groups(rewards), count > 0)
    for name, column in zip(names, values.unbind(dim=1), strict=True):
        found[f"rewards/{name}/mean"] = RowSums(column.double().nan_to_num(), ~column.isnan())
    return found


def sampling_statistics(sampled_logps: Tensor, token_logps: Tensor, mask: Tensor) -> dict[str, Statistic]:
    """How far decoding and scoring of the same policy disagree: nothing, were it not for rounding and filters.

    The difference of the log-probabilities, without its sign; the ratio of scoring to decoding, whose mean over samples
    of the decoder is 1; and the k3 estimate of the divergence of scoring from decoding, `r - 1 - log r`
    (joschu.net/blog/kl-approx.html).

    Args:
        sampled_logps: [completions, time]; NaN where the engine told none.
        token_logps: [completions, time].
        mask: [completions, time] bool: what was scored.
    """
    log_ratio = token_logps - sampled_logps
    known = mask & ~log_ratio.isnan()
    log_ratio = torch.where(known, log_ratio, 0.0)
    bounded, count = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), known.sum()
    ratio, k3 = bounded.exp(), torch.expm1(bounded) - bounded  # expm1: what is left of rounding must not hide k3
    return {
        "sampling/sampling_logp_difference/mean": Statistic(log_ratio.abs().sum(), count),
        "sampling/sampling_logp_difference/max": Statistic(_extreme(log_ratio.abs(), known, "max"), kind="max"),
        "sampling/importance_sampling_ratio/mean": Statistic((ratio * known).sum(), count),
        "sampling/importance_sampling_ratio/min": Statistic(_extreme(ratio, known, "min"), kind="min"),
        "sampling/importance_sampling_ratio/max": Statistic(_extreme(ratio, known, "max"), kind="max"),
        "sampling/k3": Statistic(k3.sum(), count),
    }


def _extreme(values: Tensor, known: Tensor, kind: Literal["min", "max"]) -> Tensor:
    """The least or greatest of the known values; an infinity, which is not logged, where there are none."""
    worst = values.new_full((1,), torch.inf if kind == "min" else -torch.inf)
    every = torch.cat([torch.where(known, values, worst).flatten(), worst])
    return every.min() if kind == "min" else every.max()
