"""The one question every paradigm asks: how probable are these tokens under this policy?

`score` answers it for any policy. Where the policy can read `Segments` (see `prepare`) nothing is padded, shared
prompts are computed once and the head sees the predicting tokens alone; elsewhere right-padded rows give the same
numbers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from alignment_modules.functional.checks import check_positive
from alignment_modules.functional.logprobs import linear_token_scores, token_collision, token_entropy, token_log_probs
from alignment_modules.policies.reading import Reading, read
from alignment_modules.policies.segments import Segments

Ask = Literal["entropy", "accuracy", "normalizer", "mean_logp", "collision"]


@dataclass(frozen=True)
class Scores:
    """What the policy thinks of the targets, in the padded shape that the segments were made from.

    Attributes:
        token_logps: `[rows, time]` log-probabilities in nats, float32 (float64 for a float64 policy), 0 where not
            scored.
        mask: `[rows, time]` bool, where scored.
        entropy: `[rows, time]` entropy in nats of the distribution that each target is one draw of, 0 where not scored;
            None if not asked for.
        correct: `[rows, time]` bool, whether the target is the most probable token; None if not asked for.
        normalizer: `[rows, time]` logsumexp of the logits, 0 where not scored; None if not asked for.
        mean_logp: `[rows, time]` mean log-probability over the vocabulary, 0 where not scored; None if not asked for.
        collision: `[rows, time]` log of the probability that two draws are the same token, `log sum p^2`, without
            gradient, 0 where not scored; None if not asked for.
    """

    token_logps: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None
    normalizer: Tensor | None = None
    mean_logp: Tensor | None = None
    collision: Tensor | None = None


def score(
    policy: nn.Module | Reading,
    segments: Segments | None = None,
    *,
    temperature: float = 1.0,
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
        ask: What else to compute, all from the same pass over the logits: "entropy" (differentiable too), "accuracy"
            (whether each target is the most probable token), "normalizer" (the logsumexp of the logits, differentiable
            too, for a z-loss), "mean_logp" (the mean log-probability over the vocabulary, differentiable too, for label
            smoothing), "collision" (the log-probability that two draws agree, not differentiable, for WPO's weights).

    Returns:
        The scores.

    Raises:
        ValueError: If `temperature` is not positive, `ask` holds something else, or the policy's output has no logits
            of the expected shape.
    """
    check_positive("temperature", temperature)
    if unknown := [name for name in ask if name not in get_args(Ask)]:
        raise ValueError(f"ask={unknown[0]!r}: allowed are {', '.join(map(repr, get_args(Ask)))}")
    if isinstance(policy, Reading):
        reading = policy
    elif segments is None:
        raise ValueError("segments=None: a policy is scored on segments, only a Reading has its own")
    else:
        reading = read(policy, segments)
    states, head, targets = reading.targets, reading.head, reading.segments.target_ids
    if (states.shape[-1] if head is None else head.linear.out_features) == 1:
        raise ValueError("the policy gives one number for a token, a scalar head's, and no distribution to score with")
    if head is None:
        wanted = "normalizer" in ask or "mean_logp" in ask
        log_normalizer = (states / temperature).logsumexp(-1) if wanted else None
        found = {
            "token_logps": token_log_probs(states, targets, temperature),
            "entropy": token_entropy(states, temperature) if "entropy" in ask else None,
            "correct": states.argmax(-1) == targets if "accuracy" in ask else None,
            "normalizer": log_normalizer if "normalizer" in ask else None,
            "mean_logp": states.mean(-1) / temperature - log_normalizer if "mean_logp" in ask else None,  # type: ignore[operator]
            "collision": token_collision(states, temperature) if "collision" in ask else None,
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
        )._asdict()
    placed: Any = {name: None if values is None else reading.place(values) for name, values in found.items()}
    return Scores(mask=reading.segments.mask(), **placed)
