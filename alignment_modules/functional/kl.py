"""Estimators of KL(policy || reference) per token, and where each of them may stand.

With `x = log p - log p_ref` of a sampled token: `k1 = x`, `k2 = x^2 / 2`, `k3 = exp(-x) - 1 + x`. `k1` and `k3` average
to the divergence, `k2` nearly so where it is small, but differentiating an estimate is not estimating the derivative:
in a loss each estimator pulls to its own optimum, and in a reward only `k1` pulls to the right one (arXiv:2510.01555,
arXiv:2512.21852, arXiv:2506.09477).

In a loss a penalty is one of tokens: token `t` is moved by its own `x_t` alone, with the prefixes taken as given. The
divergence of whole completions has the gradient `E[sum_t (sum_{s >= t} x_s) d log p_t]`: it also counts what a token
does to the divergence of those after it. Both agree for completions of one token; beyond that `k1` in the reward alone
is exact for completions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignment_modules.functional.checks import check_choice, check_same_shape

KL_ESTIMATORS = ("k1", "k2", "k3", "k1+score", "k3+score")
"""Names that `kl_penalty` takes. `+score` multiplies by the importance ratio, for the score function's gradient."""

KL_PLACEMENTS = ("loss", "reward")
"""Where a penalty may stand: added to the per-token loss, or subtracted from the reward."""

MAX_LOG_RATIO = 20.0
"""Log-ratios are bounded by this before they are exponentiated, so that one token cannot overflow float32."""

_REFUSED = {
    ("k1", "loss"): "its gradient is zero on average, so it does not hold the policy to the reference at all and "
    "training goes to the greedy policy; use 'k2', 'k3', 'k1+score' or 'k3+score' in the loss, or 'k1' in the reward",
    ("k2", "reward"): "it rewards moving away in one direction as it punishes the other, and the policy collapses onto "
    "one answer; use 'k1' in the reward, or 'k2' in the loss",
    ("k3", "reward"): "it grows without bound where the policy leaves the reference's support, and training diverges; "
    "use 'k1' in the reward, or 'k3' in the loss",
    ("k1+score", "reward"): "a reward has no gradient, so the score-function term does not exist there; use 'k1'",
    ("k3+score", "reward"): "a reward has no gradient, so the score-function term does not exist there; use 'k1'",
}


def kl_penalty(
    token_logps: Tensor,
    reference_token_logps: Tensor,
    *,
    estimator: str = "k3",
    old_token_logps: Tensor | None = None,
    ratio_token_logps: Tensor | None = None,
) -> Tensor:
    """Per-token estimate of KL(policy || reference) on tokens that the (old) policy sampled.

    | estimator in the loss | on-policy gradient at each token | optimum for completions of one token |
    |---|---|---|
    | `k2`, `k1+score`, `k3+score` | `E[x d log p]` | reverse KL, `p_ref exp(r / beta) / Z` |
    | `k3` | `E[(1 - exp(-x)) d log p]` | forward KL (the GRPO paper's) |

    For longer completions the first row has the gradient of the next-token divergences at the sampled prefixes, not of
    the completions' divergence (see the module's first lines); `E[x d log p]` is then summed over the tokens.
    `k3+score` is the ratio-corrected k3 of DeepSeek-V3.2 (arXiv:2512.02556), which is also right off policy.
    The ratio is the token's, whatever the level of the policy gradient's.
    `validate_kl_placement` says which estimator may stand where.

    Args:
        token_logps: `[batch, time]`, log-probabilities under the policy, in nats.
        reference_token_logps: `[batch, time]`, under the reference; treated as constant.
        estimator: One of `KL_ESTIMATORS`.
        old_token_logps: `[batch, time]`, under the policy that sampled; treated as constant. Only the `+score`
            estimators read it, as the ratio's denominator; None: the policy itself, a ratio of exactly 1.
        ratio_token_logps: `[batch, time]`, the ratio's numerator, where tokens were drawn from a truncated support: the
            ratio is of log-probabilities over that, the estimator of those over the whole vocabulary; None:
            `token_logps`.

    Returns:
        `[batch, time]`. `k1` may be negative. Positions outside the completion are not masked here.

    Raises:
        ValueError: If the estimator is unknown or shapes differ.

    >>> policy, reference = torch.tensor([[-1.0]]), torch.tensor([[-2.0]])
    >>> [round(kl_penalty(policy, reference, estimator=k).item(), 4) for k in ("k1", "k2", "k3")]
    [1.0, 0.5, 0.3679]
    """
    check_choice("estimator", estimator, KL_ESTIMATORS)
    check_same_shape(token_logps=token_logps, reference_token_logps=reference_token_logps)
    x = token_logps - reference_token_logps.detach()
    kind, _, score = estimator.partition("+")
    if kind == "k1":
        penalty = x
    elif kind == "k2":
        penalty = 0.5 * x.square()
    else:
        penalty = exp_bounded(-x) - 1 + x
    if not score:
        return penalty
    own = token_logps if ratio_token_logps is None else ratio_token_logps
    old = own if old_token_logps is None else old_token_logps
    check_same_shape(token_logps=token_logps, ratio_token_logps=own, old_token_logps=old)
    log_ratio = own - old.detach()
    return penalty * log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def validate_kl_placement(estimator: str, placement: str) -> None:
    """Refuse a combination of estimator and placement that does not regularise.

    Args:
        estimator: One of `KL_ESTIMATORS`.
        placement: One of `KL_PLACEMENTS`.

    Raises:
        ValueError: If a name is unknown, or the combination collapses or diverges, saying why and what to use.

    >>> validate_kl_placement("k3", "loss")
    >>> validate_kl_placement("k1", "loss")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: estimator 'k1' must not stand in the loss: its gradient is zero on average, ...
    """
    check_choice("estimator", estimator, KL_ESTIMATORS)
    check_choice("placement", placement, KL_PLACEMENTS)
    reason = _REFUSED.get((estimator, placement))
    if reason is not None:
        raise ValueError(f"estimator {estimator!r} must not stand in the {placement}: {reason}")


def binary_kl(token_logps: Tensor, other_token_logps: Tensor) -> Tensor:
    """KL of "this token or another" from the same under another model, given both log-probabilities of the token.

    Args:
        token_logps: `[batch, time]` in nats, of the distribution that the expectation is taken under.
        other_token_logps: `[batch, time]`.

    Returns:
        `[batch, time]`, 0 or more; finite unless the other gives the token a probability of 0.

    >>> binary_kl(torch.tensor(0.3).log(), torch.tensor(0.55).log())
    tensor(0.1274)
    """
    # A probability that rounds to 1 leaves some for the other tokens.
    logps, other = token_logps.clamp(max=-1e-7), other_token_logps.clamp(max=-1e-7)
    rest, other_rest = -torch.expm1(logps), -torch.expm1(other)
    return logps.exp() * (logps - other) + rest * (rest.log() - other_rest.log())


def exp_bounded(exponent: Tensor, bound: float = MAX_LOG_RATIO) -> Tensor:
    """`exp`, continued as its tangent above `bound`: finite, and its gradient keeps pointing the right way.

    >>> exp_bounded(torch.tensor([0.0, 5.0]), bound=1.0)
    tensor([ 1.0000, 13.5914])
    """
    excess = (exponent - bound).clamp(min=0)
    return torch.exp(exponent.clamp(max=bound)) * (1 + excess)
