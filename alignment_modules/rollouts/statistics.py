"""What is logged of completions and their rewards, as sums that stay exact under any split."""

from collections.abc import Sequence

import torch
from torch import Tensor

from alignment_modules.functional import aggregate
from alignment_modules.functional.statistics import Statistic


def length_statistics(mask: Tensor, truncated: Tensor) -> dict[str, Statistic]:
    """Completion lengths in tokens, of all and of those that stopped by themselves, and the share that did not.

    Args:
        mask: [completions, time] bool.
        truncated: [completions] bool.
    """
    lengths = mask.sum(dim=1).float()
    ended = ~truncated
    infinity = torch.full_like(lengths, torch.inf)
    count = float(len(lengths))
    return {
        "completions/mean_length": Statistic(lengths.sum(), count),
        "completions/min_length": Statistic(lengths.min(), kind="min"),
        "completions/max_length": Statistic(lengths.max(), kind="max"),
        "completions/mean_terminated_length": Statistic((lengths * ended).sum(), ended.sum()),
        "completions/min_terminated_length": Statistic(torch.where(ended, lengths, infinity).min(), kind="min"),
        "completions/max_terminated_length": Statistic(torch.where(ended, lengths, -infinity).max(), kind="max"),
        "completions/clipped_ratio": Statistic(truncated.float().sum(), count),
    }


def reward_statistics(names: Sequence[str], values: Tensor, total: Tensor) -> dict[str, Statistic]:
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


def group_statistics(rewards: Tensor) -> dict[str, Statistic]:
    """Mean and spread of the groups' rewards.

    Args:
        rewards: [prompts, group] float; NaN stands for a reward that does not apply.
    """
    applies = ~rewards.isnan()
    count = applies.sum(dim=1)
    mean = rewards.nansum(dim=1) / count.clamp(min=1)
    squares = torch.where(applies, (rewards - mean[:, None]).square(), 0.0).sum(dim=1)
    largest = torch.where(applies, rewards, -torch.inf).amax(dim=1)
    smallest = torch.where(applies, rewards, torch.inf).amin(dim=1)
    groups = (count > 0).sum()
    reward = {"reward": Statistic(mean.sum(), groups)}
    if rewards.shape[1] == 1:  # one completion of a prompt is compared with none
        return reward
    return reward | {
        "reward_std": Statistic((squares / (count - 1).clamp(min=1)).sqrt().sum(), groups),
        "frac_reward_zero_std": Statistic(((largest - smallest < 1e-6) & (count > 0)).sum(), groups),
    }


def sampling_statistics(sampled_logps: Tensor, token_logps: Tensor, mask: Tensor) -> dict[str, Statistic]:
    """How far decoding and scoring of the same policy disagree.

    Args:
        sampled_logps: [completions, time]; NaN where the engine told none.
        token_logps: [completions, time].
        mask: [completions, time] bool: what was scored.
    """
    difference = (sampled_logps - token_logps).abs()
    known = mask & ~difference.isnan()
    total, weight = aggregate(difference.nan_to_num(), known, reduction="token_mean")
    largest = torch.where(known, difference, -torch.inf).flatten()
    largest = torch.cat([largest, largest.new_full((1,), -torch.inf)]).max()
    return {
        "sampling/sampling_logp_difference/mean": Statistic(total, weight),
        "sampling/sampling_logp_difference/max": Statistic(largest, kind="max"),
    }
