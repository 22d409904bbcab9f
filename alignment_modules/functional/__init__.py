"""Pure tensor functions: log-probabilities, losses, advantages, divergences, reductions."""

from alignment_modules.functional.logprobs import (
    LinearTokenScores,
    linear_token_log_probs,
    linear_token_scores,
    token_entropy,
    token_log_probs,
)

__all__ = [
    "LinearTokenScores",
    "linear_token_log_probs",
    "linear_token_scores",
    "token_entropy",
    "token_log_probs",
]
