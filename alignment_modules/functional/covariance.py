"""The tokens of an optimizer step whose log-probability and advantage vary together: what lowers the entropy most."""

from __future__ import annotations

import torch
from torch import Tensor

from alignment_modules.functional.checks import check_same_shape
from alignment_modules.functional.surrogate import Surrogate


def token_covariance(token_logps: Tensor, advantages: Tensor) -> Tensor:
    """`(log p - mean log p) (A - mean A)` of each token; their mean is the covariance (arXiv:2505.22617).

    Args:
        token_logps: `[tokens]`, all tokens of an optimizer step, in nats.
        advantages: `[tokens]`.

    Returns:
        `[tokens]` float64.

    >>> token_covariance(torch.tensor([-1.0, -3.0]), torch.tensor([1.0, -1.0]))
    tensor([1., 1.], dtype=torch.float64)
    """
    logps, advantages = token_logps.double(), advantages.double()
    return (logps - logps.mean()) * (advantages - advantages.mean())


@torch.no_grad()
def high_covariance(
    surrogate: Surrogate, token_logps: Tensor, advantages: Tensor, clipped: Tensor, draws: Tensor
) -> Tensor:
    """The tokens that "clip_cov" or "kl_cov" treat apart: a `share` of all, at least one.

    "clip_cov" draws them from those whose covariance is between `covariance_low` and `covariance_high` and that are
    not clipped by their ratio; "kl_cov" takes those of highest covariance.

    Args:
        surrogate: With one of these losses.
        token_logps: `[tokens]`, all tokens of an optimizer step, in nats.
        advantages: `[tokens]`.
        clipped: `[tokens]` bool, whether the ratio is clipped; "kl_cov" does not read it.
        draws: `[tokens]`, a random number for each; the smallest are drawn. "kl_cov" does not read them.

    Returns:
        `[tokens]` bool. Tokens that share the last place are all in.

    Raises:
        ValueError: If the loss has no use for it, or shapes differ.
    """
    if not surrogate.row.selects:
        raise ValueError(f"loss={surrogate.loss!r} treats no token apart by its covariance")
    check_same_shape(token_logps=token_logps, advantages=advantages, clipped=clipped, draws=draws)
    if not len(token_logps):
        return torch.zeros_like(clipped, dtype=torch.bool)
    numbers, covariance = surrogate.numbers, token_covariance(token_logps, advantages)
    last = max(int(numbers["share"] * len(covariance) + 1e-9), 1) - 1
    if surrogate.loss == "kl_cov":
        return covariance >= covariance.sort(descending=True).values[last]
    open_to_it = (covariance > numbers["covariance_low"]) & (covariance < numbers["covariance_high"]) & ~clipped.bool()
    return open_to_it & (draws <= draws.masked_fill(~open_to_it, torch.inf).sort().values[last])


@torch.no_grad()
def top_quantile(values: Tensor, share: float) -> Tensor:
    """Which values belong to the highest `share`: those at or above the quantile `1 - share`.

    Args:
        values: `[tokens]`, such as entropies in nats.
        share: In (0, 1].

    Returns:
        `[tokens]` bool. The quantile lies between two values where the share is no whole number of them.

    >>> top_quantile(torch.tensor([0.1, 0.4, 0.2, 0.3]), 0.5)
    tensor([False,  True, False,  True])
    """
    if not len(values):
        return torch.zeros_like(values, dtype=torch.bool)
    ordered, place = values.double().sort().values, (1 - share) * (len(values) - 1)
    below = min(int(place + 1e-9), len(values) - 1)
    above, part = min(below + 1, len(values) - 1), max(place - below, 0.0)
    return values.double() >= ordered[below] + part * (ordered[above] - ordered[below])
