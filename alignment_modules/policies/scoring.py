"""The one question every paradigm asks: how probable are these tokens under this policy?

`score` answers it for any policy. Where the policy can read `Segments` (see `prepare`) nothing is padded, shared
prompts are computed once and the head sees the predicting tokens alone; elsewhere right-padded rows give the same
numbers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from alignment_modules.functional.checks import check_positive
from alignment_modules.functional.logprobs import linear_token_scores, token_collision, token_entropy, token_log_probs
from alignment_modules.functional.support import Support
from alignment_modules.policies.reading import Reading, read
from alignment_modules.policies.segments import Segments

Ask = Literal["entropy", "accuracy", "normalizer", "mean_logp", "collision", "full_logps"]


@dataclass(frozen=True)
class Scores:
    """What the policy thinks of the targets, in the padded shape that the segments were made from.

    Attributes:
        token_logps: `[rows, time]` log-probabilities in nats, float32 (float64 for a float64 policy), 0 where not
            scored.
        mask: `[rows, time]` bool, where scored.
        entropy: `[rows, time]` entropy in nats of the distribution that each target is one draw of, 0 where not scored;
            None if not asked for. With a support it is the one over the support.
        correct: `[rows, time]` bool, whether the target is the most probable token (of the support); None if not asked
            for.
        normalizer: `[rows, time]` logsumexp of the logits, 0 where not scored; None if not asked for.
        mean_logp: `[rows, time]` mean log-probability over the vocabulary, 0 where not scored; None if not asked for.
        collision: `[rows, time]` log of the probability that two draws are the same token, `log sum p^2` (over the
            support), without gradient, 0 where not scored; None if not asked for.
        full_logps: `[rows, time]` log-probabilities over the whole vocabulary, differentiable, 0 where not scored; None
            if not asked for. Without a support it is `token_logps`.
    """

    token_logps: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None
    normalizer: Tensor | None = None
    mean_logp: Tensor | None = None
    collision: Tensor | None = None
    full_logps: Tensor | None = None


def score(
    policy: nn.Module | Reading,
    segments: Segments | None = None,
    *,
    temperature: float = 1.0,
    support: Support | None = None,
    ask: Collection[Ask] = (),
) -> Scores:
    """Log-probabilities of the targets of `segments` under `policy`, differentiable in all its parameters.

    Equal up to rounding to the padded computation `log_softmax(policy(input_ids).logits / temperature)`. Train or eval
    mode is the caller's business, as is `torch.no_grad`. Without any target the result is zero but still hangs on the
    parameters, so that every rank of a distributed run takes part in the backward pass.

    Args:
        policy: What to score with, as in `read`; or a `Reading` of it, which is not computed again.
        segments: What to score; None with a reading, which has its own.
        temperature: Divides the logits, > 0. Use the temperature that the tokens were sampled with.
        support: `[rows, time]` of the output, on any device: the tokens that each target was drawn from by truncated
            sampling (top-k, top-p, min-p). Log-probabilities, entropy, accuracy and collision are then those of the
            softmax over these tokens alone, the distribution that was sampled from; a target that is none of them has
            a log-probability of -inf. None: the whole vocabulary.
        ask: What else to compute, all from the same pass over the logits: "entropy" (differentiable too), "accuracy"
            (whether each target is the most probable token), "normalizer" (the logsumexp of the logits, differentiable
            too, for a z-loss), "mean_logp" (the mean log-probability over the vocabulary, differentiable too, for label
            smoothing), "collision" (the log-probability that two draws agree, not differentiable, for WPO's weights),
            "full_logps" (with a support also the log-probabilities over the whole vocabulary, differentiable too, for a
            comparison with a model that did not sample).

    Returns:
        The scores.

    Raises:
        ValueError: If `temperature` is not positive, `ask` holds something else, or with a support what is of the
            whole vocabulary alone ("normalizer", "mean_logp"), the support has another shape than the output, or the
            policy's output has no logits of the expected shape.
    """
    check_positive("temperature", temperature)
    if unknown := [name for name in ask if name not in get_args(Ask)]:
        raise ValueError(f"ask={unknown[0]!r}: allowed are {', '.join(map(repr, get_args(Ask)))}")
    if support is not None and (whole := {"normalizer", "mean_logp"} & {*ask}):
        raise ValueError(f"ask={min(whole)!r} is of the whole vocabulary: it cannot be had over a support")
    if isinstance(policy, Reading):
        reading = policy
    elif segments is None:
        raise ValueError("segments=None: a policy is scored on segments, only a Reading has its own")
    else:
        reading = read(policy, segments)
    states, head, targets = reading.targets, reading.head, reading.segments.target_ids
    if (states.shape[-1] if head is None else head.linear.out_features) == 1:
        raise ValueError("the policy gives one number for a token, a scalar head's, and no distribution to score with")
    kept = None if support is None else _of_targets(support, reading.segments, states.device)
    if head is None:
        full_logps = None
        if kept is not None:
            full_logps = token_log_probs(states, targets, temperature) if "full_logps" in ask else None
            states = states.masked_fill(kept.excluded(slice(0, len(targets)), states.shape[-1]), -torch.inf)
        wanted = "normalizer" in ask or "mean_logp" in ask
        log_normalizer = (states / temperature).logsumexp(-1) if wanted else None
        found = {
            "token_logps": token_log_probs(states, targets, temperature),
            "entropy": token_entropy(states, temperature) if "entropy" in ask else None,
            "correct": states.argmax(-1) == targets if "accuracy" in ask else None,
            "normalizer": log_normalizer if "normalizer" in ask else None,
            "mean_logp": states.mean(-1) / temperature - log_normalizer if "mean_logp" in ask else None,  # type: ignore[operator]
            "collision": token_collision(states, temperature) if "collision" in ask else None,
            "full_logps": full_logps,
        }
    else:
        found = linear_token_scores(
            states,
            head.linear.weight,
            targets,
            bias=head.linear.bias,
            temperature=temperature,
            logit_scale=head.scale,
            softcap=head.softcap,
            with_entropy="entropy" in ask,
            with_correct="accuracy" in ask,
            with_normalizer="normalizer" in ask,
            with_mean_logp="mean_logp" in ask,
            with_collision="collision" in ask,
            support=kept,
            with_full_logps=kept is not None and "full_logps" in ask,
        )._asdict()
    if kept is None:
        found.pop("full_logps")
    placed: Any = {name: None if values is None else reading.place(values) for name, values in found.items()}
    if kept is None and "full_logps" in ask:
        placed["full_logps"] = placed["token_logps"]
    return Scores(mask=reading.segments.mask(), **placed)


def _of_targets(support: Support, segments: Segments, device: torch.device) -> Support:
    """The sets of the targets, in their order.

    Raises:
        ValueError: If the support has another shape than the output.
    """
    if tuple(support.shape) != tuple(segments.shape):
        raise ValueError(f"support must be {list(segments.shape)}, one set a token, got shape {tuple(support.shape)}")
    return support.take(segments.to("cpu").slot).to(device)
