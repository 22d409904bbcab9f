"""How far a policy's next-token distributions are from a teacher's, at the targets that both read."""

from __future__ import annotations

import torch
from torch import Tensor

from alignment_modules.functional import Divergence, LinearHead, distribution_divergence, linear_divergence
from alignment_modules.functional.divergence import JsdBeta
from alignment_modules.functional.ranges import Count, Positive, check_options
from alignment_modules.policies.forward import Head
from alignment_modules.policies.reading import Reading


def divergence(
    reading: Reading,
    teacher_reading: Reading,
    *,
    kind: Divergence = "reverse",
    jsd_beta: JsdBeta = 0.5,
    temperature: Positive = 1.0,
    vocabulary: Count | None = None,
) -> Tensor:
    """Divergence at every target, over the whole vocabulary; differentiable in the policy, the teacher is a constant.

    Each model's logits come from its own head, with its own scale and soft-cap, chunk by chunk (`linear_divergence`).
    Prompts that the segments share were computed once by both.

    Args:
        reading: The policy's.
        teacher_reading: The teacher's, of the same segments; or of segments of some of the same targets (as of a batch
            whose other labels are -100).
        kind: "forward", "reverse" or "jsd"; see `distribution_divergence`.
        jsd_beta: Share of the teacher in the mixture of "jsd", from 0.05 to 0.95.
        temperature: Divides the logits of both models, > 0.
        vocabulary: Compares the first so many tokens alone, for heads that are padded to two sizes. None: all.

    Returns:
        `[rows, time]` in nats, in the padded shape of the segments; 0 where the teacher read no target.

    Raises:
        ValueError: If the padded shapes or the vocabularies have different sizes, or an option has a value that is not
            allowed.
    """
    check_options(divergence, locals())
    states, teacher_states = reading.targets, teacher_reading.targets
    shape, slot = reading.segments.shape, teacher_reading.segments.slot
    if teacher_reading.segments is not reading.segments:
        if teacher_reading.segments.shape != shape:
            raise ValueError(f"the teacher read rows of {teacher_reading.segments.shape}, the policy of {shape}")
        where = slot.new_full((shape[0] * shape[1],), -1)
        where[reading.segments.slot] = torch.arange(len(states), device=slot.device)
        states = states.index_select(0, where[slot])
    sizes = [_size(one, vocabulary) for one in (reading, teacher_reading)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the policy's vocabulary has {sizes[0]} tokens and the teacher's {sizes[1]}: a divergence compares the "
            "probabilities of the same tokens. Where both have one tokenizer and are padded to different sizes, give "
            "vocabulary, the number of tokens to compare"
        )
    if reading.head is None or teacher_reading.head is None:
        logits = [one.outputs(part) for one, part in ((reading, states), (teacher_reading, teacher_states))]
        ours, theirs = (part[:, : sizes[0]] for part in logits)
        values = distribution_divergence(ours, theirs.to(ours), kind=kind, jsd_beta=jsd_beta, temperature=temperature)
    else:
        values = linear_divergence(
            states,
            _parts(reading.head, sizes[0]),
            teacher_states,
            _parts(teacher_reading.head, sizes[0]),
            kind=kind,
            jsd_beta=jsd_beta,
            temperature=temperature,
        )
    return values.new_zeros(shape[0] * shape[1]).index_copy(0, slot, values).view(shape)


def _size(reading: Reading, vocabulary: int | None) -> int:
    size = reading.states.shape[-1] if reading.head is None else reading.head.linear.out_features
    return size if vocabulary is None else min(size, vocabulary)


def _parts(head: Head, vocabulary: int) -> LinearHead:
    """The parts of a head, cut to the tokens that are compared."""
    weight: Tensor = head.linear.weight
    bias: Tensor | None = head.linear.bias
    if len(weight) > vocabulary:
        weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
    return LinearHead(weight, bias, head.scale, head.softcap)
