"""Log-probabilities and entropies of target tokens.

Everything here reduces in float32 (float64 inputs stay float64) whatever the dtype of the logits, because a
log-softmax over a large vocabulary loses its digits in bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment_modules.functional.checks import check_positive
from alignment_modules.functional.head_chunks import check_head, factor_and_cap, upcast
from alignment_modules.functional.linear_head import HeadSettings, LinearTokenScores, apply_linear_head
from alignment_modules.functional.support import Support

IGNORED_TARGET = -100


def token_log_probs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target token, `log_softmax(logits / temperature)[target]`.

    `logits[..., t, :]` must be the distribution of `targets[..., t]`: shift before you call.

    Args:
        logits: `[batch, time, vocabulary]` (any leading shape), any floating dtype.
        targets: `[batch, time]` int64. Where a target is -100 the result is 0 and has no gradient.
        temperature: Divides the logits, > 0. Use the temperature that the tokens were sampled with.

    Returns:
        `[batch, time]` in nats, float32, or float64 for float64 logits.

    Raises:
        ValueError: If the shapes do not fit or `temperature` is not positive.

    >>> token_log_probs(torch.zeros(1, 2, 4), torch.tensor([[3, 0]]))
    tensor([[-1.3863, -1.3863]])
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have the shape of logits without its last dimension, {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    scaled = upcast(logits)
    if check_positive("temperature", temperature) != 1.0:
        scaled = scaled / temperature
    width = logits.shape[-1]
    losses = F.cross_entropy(
        scaled.reshape(-1, width), targets.reshape(-1), reduction="none", ignore_index=IGNORED_TARGET
    )
    return -losses.reshape(targets.shape)


def sequence_logps(token_logps: Tensor) -> Tensor:
    """Sums over tokens, in float64: in float32 those of some thousand tokens can flip the sign of a small margin.

    Args:
        token_logps: `[batch, time]` in nats, 0 where not scored.

    Returns:
        `[batch]`, float64 (float32 on devices without it), differentiable.

    >>> sequence_logps(torch.tensor([[1e8, 1.0, -1e8]]))
    tensor([1.], dtype=torch.float64)
    """
    return token_logps.sum(dim=1, dtype=torch.float32 if token_logps.device.type == "mps" else torch.float64)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of each position's distribution, `-sum p log p` with `p = softmax(logits / temperature)`.

    Args:
        logits: `[batch, time, vocabulary]` (any leading shape); entries of -inf count as probability 0.
        temperature: Divides the logits, > 0.

    Returns:
        `[batch, time]` in nats, float32, or float64 for float64 logits.

    Raises:
        ValueError: If `temperature` is not positive.

    >>> token_entropy(torch.tensor([0.0, 0.0, float("-inf")]))
    tensor(0.6931)
    """
    log_p = F.log_softmax(upcast(logits) / check_positive("temperature", temperature), dim=-1)
    # 0 * -inf is NaN both in the value and in the gradient.
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(dim=-1)


@torch.no_grad()
def token_collision(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability that two draws from a distribution agree, `log sum p^2` with `p = softmax(logits / temperature)`.

    Args:
        logits: `[batch, time, vocabulary]` (any leading shape).
        temperature: Divides the logits, > 0.

    Returns:
        `[batch, time]` in nats, float32, or float64 for float64 logits, without gradient.

    Raises:
        ValueError: If `temperature` is not positive.

    >>> token_collision(torch.zeros(4))
    tensor(-1.3863)
    """
    log_p = F.log_softmax(upcast(logits) / check_positive("temperature", temperature), dim=-1)
    return log_p.mul_(2).logsumexp(dim=-1)


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int = 256 * 2**20,
) -> Tensor:
    """Log-probability of each target under a linear head, without a log-softmax copy of the logits.

    The logits are `x = logit_scale * (hidden @ weight.T + bias)`, then `softcap * tanh(x / softcap)` if `softcap` is
    given, then divided by `temperature`. Their buffer is kept once and overwritten by its own gradient in the
    backward pass. If it would exceed `max_chunk_bytes`, the rows are done in chunks, nothing is kept, and the backward
    pass computes each chunk's logits again. Under autocast the product runs in autocast's dtype, as `nn.Linear` would.

    Args:
        hidden: `[n, d]`, hidden states of the positions that predict the targets.
        weight: `[vocabulary, d]`, the head's weight, in the dtype of `hidden`.
        targets: `[n]` int64, each in `[0, vocabulary)`.
        bias: `[vocabulary]` or None.
        temperature: Divides the final logits, > 0.
        logit_scale: Multiplies the head's output (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: Gemma 2's `final_logit_softcapping`, > 0, or None.
        max_chunk_bytes: Largest buffer of logits in bytes.

    Returns:
        `[n]` in nats, float32, or float64 for float64 inputs. Gradients flow to `hidden`, `weight` and `bias`, once
        differentiable.

    Raises:
        ValueError: If shapes do not fit, or `temperature`, `softcap` or `max_chunk_bytes` is not positive.

    >>> linear_token_log_probs(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])
    """
    return linear_token_scores(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        max_chunk_bytes=max_chunk_bytes,
    ).token_logps


def linear_token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int = 256 * 2**20,
    with_entropy: bool = False,
    with_correct: bool = False,
    with_normalizer: bool = False,
    with_mean_logp: bool = False,
    with_collision: bool = False,
    support: Support | None = None,
    with_full_logps: bool = False,
) -> LinearTokenScores:
    """`linear_token_log_probs` and, from the same pass over the logits, what else is asked for.

    Args:
        hidden: As in `linear_token_log_probs`, and so are the others that are not named here.
        weight: `[vocabulary, d]`.
        targets: `[n]` int64.
        bias: `[vocabulary]` or None.
        temperature: Divides the final logits, > 0.
        logit_scale: Multiplies the head's output.
        softcap: Bound of the soft-capped logits, > 0, or None.
        max_chunk_bytes: Largest buffer of logits in bytes.
        with_entropy: Also compute the entropy. It is differentiable; unused, its gradient costs nothing.
        with_correct: Also compute whether the target is the most probable token.
        with_normalizer: Also compute the logsumexp of the logits, differentiable (for a z-loss).
        with_mean_logp: Also compute the mean log-probability over the vocabulary, differentiable (for label smoothing).
        with_collision: Also compute `log sum p^2`, without gradient (for WPO's weights).
        support: `[n]`, the tokens that each target was drawn from, on the device of `hidden`: probabilities, entropy,
            the most probable token and `log sum p^2` are those of the softmax over these alone, and a target that is
            none of them has a log-probability of -inf. None: the whole vocabulary.
        with_full_logps: Also compute the log-probability over the whole vocabulary, differentiable.

    Returns:
        `LinearTokenScores` with None for what was not asked for.

    Raises:
        ValueError: If shapes do not fit, `temperature`, `softcap` or `max_chunk_bytes` is not positive, or what is of
            the whole vocabulary alone, a normalizer or mean, is asked for with a support.

    >>> scores = linear_token_scores(torch.eye(2), 9 * torch.eye(2), torch.tensor([0, 0]), with_correct=True)
    >>> scores.correct
    tensor([ True, False])
    """
    check_head(hidden, weight, bias)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], got shape {tuple(targets.shape)}")
    if support is not None and support.shape != targets.shape:
        raise ValueError(f"support must be [{len(targets)}], one set a target, got shape {tuple(support.shape)}")
    if support is not None and (with_normalizer or with_mean_logp):
        name = "with_normalizer" if with_normalizer else "with_mean_logp"
        raise ValueError(f"{name}=True is of the whole vocabulary: it cannot be had over a support")
    alpha, cap = factor_and_cap(logit_scale, softcap, temperature)
    check_positive("max_chunk_bytes", max_chunk_bytes)
    asked = (with_entropy, with_correct, with_normalizer, with_mean_logp, with_collision)
    both = with_full_logps and support is not None
    settings = HeadSettings(alpha, cap, max_chunk_bytes, *asked, with_full_logps=both)
    scores = apply_linear_head(hidden, weight, bias, targets, settings, support)
    return scores._replace(full_logps=scores.token_logps) if with_full_logps and not both else scores
