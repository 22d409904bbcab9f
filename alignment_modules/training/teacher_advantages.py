"""On-policy distillation as a policy gradient: a teacher judges every token that the policy wrote."""

from dataclasses import replace
from typing import cast

from torch import Tensor

from alignment_modules.functional import aggregate
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.frozen import Frozen
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.acting import ActingModule


def add_teacher(module: ActingModule, rollout: Rollout, teacher: Frozen, coef: float) -> tuple[Rollout, Statistic]:
    """Adds `-coef (log p - log p_teacher)` to the advantage of each token, `p` being the policy that sampled.

    Its expectation is minus the reverse KL of the token from the teacher, whose gradient the surrogate so follows, each
    token by itself (discount 0). Both are log-probabilities at the sampling temperature, and constants.

    Args:
        module: Whose policy wrote, and which scores.
        rollout: Of the whole batch on this rank, with its advantages.
        teacher: The teacher.
        coef: Weight of the term.

    Returns:
        The rollout with advantages [N, T], and the mean log-ratio over all tokens that the policy wrote.
    """
    own, logps = rollout.own.to(module.device), rollout.old_logps
    if logps is None:
        unknown = rollout.sampled_logps.isnan() & rollout.own.to(rollout.sampled_logps.device)
        logps = module.score_rollout(rollout) if bool(unknown.any()) else rollout.sampled_logps
    log_ratio = (logps - module.score_rollout(rollout, teacher)).masked_fill(~own, 0.0)
    given = cast(Tensor, rollout.advantages)
    advantages = (given[:, None] if given.dim() == 1 else given).to(log_ratio) - coef * log_ratio
    kl = Statistic(*aggregate(log_ratio, own, reduction="token_mean"))
    return replace(rollout, advantages=advantages.masked_fill(~own, 0.0)), kl
