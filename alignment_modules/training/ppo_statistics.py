"""What is logged of PPO: the names of TRL's, and what a person watches of a critic."""

from collections.abc import Mapping

import torch
from torch import Tensor

from alignment_modules.functional import explained_variance
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.scoring import Scores
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.policy_gradient import token_mean


def rollout_statistics(
    rollout: Rollout,
    scores: Tensor,
    penalty: Tensor | None,
    values: Tensor,
    returns: Tensor,
    trained: Tensor,
    kl_coef: Tensor | float,
) -> dict[str, Statistic]:
    """Of a rollout: what its completions were rewarded with, and how far the critic foresaw it.

    Args:
        rollout: Of the whole batch on this rank.
        scores: [N] of the completions; NaN: not judged.
        penalty: [N, T], what the KL takes from each token's reward; None: nothing.
        values: [N, T], the critic's.
        returns: [N, T], what it is to learn.
        trained: [N, T] bool: what values and returns are counted of.
        kl_coef: What the log-ratios to the reference were multiplied with in the penalty.
    """
    judged = ~scores.isnan()
    count = judged.sum()
    owed = torch.zeros_like(scores) if penalty is None else -penalty.sum(dim=1)
    own = rollout.own.to(scores.device)
    entropy = torch.where(own, -rollout.sampled_logps.to(scores.device), 0.0).sum(dim=1)
    told = ~entropy.isnan()
    found = {
        "objective/scores": Statistic(scores.nansum(), count),
        "objective/non_score_reward": Statistic(torch.where(judged, owed, 0.0).sum(), count),
        "objective/rlhf_reward": Statistic((scores + owed).nansum(), count),
        "objective/entropy": Statistic(entropy.nansum(), told.sum()),
        "val/num_eos_tokens": Statistic((~rollout.truncated).sum().float(), float(len(rollout.truncated))),
        "critic/values": token_mean(values, trained),
        "critic/returns": token_mean(returns, trained),
        "critic/explained_variance": explained_variance(values, returns, trained),
    }
    old = rollout.sampled_logps if rollout.old_logps is None else rollout.old_logps
    if rollout.reference_logps is not None:
        log_ratios = torch.where(own, old - rollout.reference_logps, 0.0).sum(dim=1)
        # the penalty is over the whole vocabulary on both sides
        divergence = log_ratios if penalty is None else -owed / kl_coef
        found["objective/kl"] = Statistic(divergence.nansum(), (~divergence.isnan()).sum())
    return found


def update_statistics(rollout: Rollout, scores: Scores, known: Mapping[str, Statistic]) -> dict[str, Statistic]:
    """Of a piece of an update: how far the policy has moved, and what is known already under the names of TRL's.

    Args:
        rollout: The piece.
        scores: Of its trained tokens.
        known: What else is logged of it.
    """
    logps, mask = scores.token_logps.detach(), scores.mask
    change = torch.zeros_like(logps) if rollout.old_logps is None else logps - rollout.old_logps
    ratio = torch.where(mask, change, 0.0).clamp(-20.0, 20.0).exp().double() * mask
    found = {
        "policy/approxkl_avg": token_mean(0.5 * change.square(), mask),
        "val/ratio": token_mean(ratio, mask),
        "val/ratio_var": Statistic(torch.stack([ratio.sum(), ratio.square().sum()]), mask.sum(), "var"),
    }
    names = {
        "loss/policy_avg": "loss",
        "policy/entropy_avg": "entropy",
        "policy/clipfrac_avg": "clip_ratio/region_mean",
    }
    return found | {name: known[other] for name, other in names.items() if other in known}
