"""Pure tensor functions: log-probabilities, losses, advantages, divergences, reductions."""

from alignment_modules.functional.advantages import (
    ADVANTAGE_SCALES,
    AGGREGATIONS,
    BASELINES,
    AdvantageEstimator,
    decoupled_rewards,
    group_advantages,
    informative_groups,
)
from alignment_modules.functional.corrections import CORRECTIONS, Correction, as_correction, correction_statistics
from alignment_modules.functional.covariance import high_covariance, token_covariance, top_quantile
from alignment_modules.functional.divergence import (
    Divergence,
    JsdBeta,
    LinearHead,
    distribution_divergence,
    linear_divergence,
)
from alignment_modules.functional.kl import KL_ESTIMATORS, KL_PLACEMENTS, binary_kl, kl_penalty, validate_kl_placement
from alignment_modules.functional.logprobs import (
    LinearTokenScores,
    linear_token_log_probs,
    linear_token_scores,
    sequence_logps,
    token_collision,
    token_entropy,
    token_log_probs,
)
from alignment_modules.functional.preference import (
    BATCH_COUPLED_LOSSES,
    F_DIVERGENCES,
    PREFERENCE_LOSSES,
    Preference,
    length_desensitized_logps,
    preference_loss,
)
from alignment_modules.functional.reductions import REDUCTIONS, aggregate, aggregate_rows, masked_mean
from alignment_modules.functional.reference_free import (
    REFERENCE_FREE_LOSSES,
    ReferenceFreeLoss,
    check_reference_free,
    log_odds,
    odds_ratio_loss,
    reference_free_loss,
)
from alignment_modules.functional.reward import reward_pair_loss
from alignment_modules.functional.router import expert_counts, load_balancing_loss, router_shares
from alignment_modules.functional.support import Support
from alignment_modules.functional.surrogate import (
    IMPORTANCE_LEVELS,
    LOSS_REDUCTIONS,
    ClipMasks,
    Surrogate,
    importance_ratio,
    policy_gradient_loss,
)
from alignment_modules.functional.token_baselines import gradient_norms, optimal_token_advantages, returns_to_go
from alignment_modules.functional.turns import over_turns, turn_returns, turn_sums
from alignment_modules.functional.unpaired import UnpairedLoss, mismatched, mismatched_completions, unpaired_loss
from alignment_modules.functional.value import (
    explained_variance,
    generalized_advantages,
    length_adaptive_lambda,
    token_rewards,
    turn_starts,
    value_loss,
    whiten,
)

__all__ = [
    "ADVANTAGE_SCALES",
    "AGGREGATIONS",
    "BASELINES",
    "BATCH_COUPLED_LOSSES",
    "CORRECTIONS",
    "F_DIVERGENCES",
    "IMPORTANCE_LEVELS",
    "KL_ESTIMATORS",
    "KL_PLACEMENTS",
    "LOSS_REDUCTIONS",
    "PREFERENCE_LOSSES",
    "REDUCTIONS",
    "REFERENCE_FREE_LOSSES",
    "AdvantageEstimator",
    "ClipMasks",
    "Correction",
    "Divergence",
    "JsdBeta",
    "LinearHead",
    "LinearTokenScores",
    "Preference",
    "ReferenceFreeLoss",
    "Support",
    "Surrogate",
    "UnpairedLoss",
    "aggregate",
    "aggregate_rows",
    "as_correction",
    "binary_kl",
    "check_reference_free",
    "correction_statistics",
    "decoupled_rewards",
    "distribution_divergence",
    "expert_counts",
    "explained_variance",
    "generalized_advantages",
    "gradient_norms",
    "group_advantages",
    "high_covariance",
    "importance_ratio",
    "informative_groups",
    "kl_penalty",
    "length_adaptive_lambda",
    "length_desensitized_logps",
    "linear_divergence",
    "linear_token_log_probs",
    "linear_token_scores",
    "load_balancing_loss",
    "log_odds",
    "masked_mean",
    "mismatched",
    "mismatched_completions",
    "odds_ratio_loss",
    "optimal_token_advantages",
    "over_turns",
    "policy_gradient_loss",
    "preference_loss",
    "reference_free_loss",
    "returns_to_go",
    "reward_pair_loss",
    "router_shares",
    "sequence_logps",
    "token_collision",
    "token_covariance",
    "token_entropy",
    "token_log_probs",
    "token_rewards",
    "top_quantile",
    "turn_returns",
    "turn_starts",
    "turn_sums",
    "unpaired_loss",
    "validate_kl_placement",
    "value_loss",
    "whiten",
]
