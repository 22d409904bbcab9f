"""Reading: one forward pass of a policy, from which any number of readers take what they need.

`score` reads log-probabilities off it, a `ValueHead` values, a reward model its scalar: a shared trunk is one reading
and two readers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.functional.head_chunks import upcast
from alignment_modules.policies.context import check_length
from alignment_modules.policies.forward import (
    Head,
    States,
    classifies,
    find_head,
    language_model,
    packed_states,
    padded_states,
)
from alignment_modules.policies.noise import EmbeddingNoise
from alignment_modules.policies.offloading import offloaded
from alignment_modules.policies.probing import prepare
from alignment_modules.policies.segments import Segments
from alignment_modules.policies.sharded import forward_pass, is_sharded


@dataclass(frozen=True, eq=False)
class Reading:
    """The states of the tokens that segments ask for, and the head that the policy puts on them.

    Attributes:
        states: `[reads, hidden]`, differentiable in the policy's parameters; where `head` is None the policy's outputs
            themselves, `[reads, vocabulary]` or `[reads, outputs]`. Rows of `segments.source`.
        head: The policy's linear head; None where it cannot be told from the rest.
        segments: What was read.
        router_logits: Where they are asked for: of each layer with experts `[tokens, experts]`, differentiable, the
            router's logits of all tokens that were computed, in any order; else empty.
    """

    states: Tensor
    head: Head | None
    segments: Segments
    router_logits: tuple[Tensor, ...] = ()

    @property
    def targets(self) -> Tensor:
        """States `[targets, hidden]` of the tokens that predict the targets."""
        return self.states if self.segments.last_rows is None else self.states[: len(self.segments.target_ids)]

    @property
    def last(self) -> Tensor:
        """State `[rows, hidden]` of each row's last token, 0 for a row without tokens (`segments.has_last()`).

        Raises:
            ValueError: If the segments were made with `reads="targets"`.
        """
        rows = self.segments.last_rows
        if rows is None:
            raise ValueError('the segments were made with reads="targets"; reads="last" or "targets+last" is needed')
        states = self.states[len(self.segments.target_ids) :]
        return states.new_zeros(self.segments.shape[0], *states.shape[1:]).index_copy(0, rows, states)

    def outputs(self, states: Tensor) -> Tensor:
        """What the policy's own head makes of states: `[..., outputs]` in float32 (float64 for a float64 policy).

        Args:
            states: `targets`, `last` or some rows of them.
        """
        states = upcast(states)
        with torch.autocast(states.device.type, enabled=False):
            return states if self.head is None else self.head(states, states.dtype)

    def place(self, values: Tensor) -> Tensor:
        """Puts one value a target where it belongs: `[targets, ...]` to `[rows, time, ...]`, 0 elsewhere."""
        rows, time = self.segments.shape
        flat = values.new_zeros(rows * time, *values.shape[1:]).index_copy(0, self.segments.slot, values)
        return flat.view(rows, time, *values.shape[1:])


def read(
    policy: nn.Module, segments: Segments, *, routers: bool = False, neftune_alpha: float | None = None
) -> Reading:
    """One forward pass; differentiable in all parameters of the policy.

    The states are those of the padded computation up to rounding. Train or eval mode is the caller's business, as is
    `torch.no_grad`. Where nothing is asked for the policy still runs on one token, so that what is made of the reading
    hangs on the parameters, and every rank of a distributed run takes part in the backward pass.

    Args:
        policy: A causal language model or sequence classifier of transformers, also with peft adapters, or any causal
            module that maps `input_ids` `[batch, time]` to outputs `[batch, time, vocabulary or outputs]` (a tensor,
            or an object with `.logits`).
        segments: What to read, on the policy's device.
        routers: Whether the router logits of a mixture of experts are wanted, too (`find_router` says whether a policy
            gives them). The last layer is then computed for every token.
        neftune_alpha: Adds noise of this size to the input embeddings (`EmbeddingNoise`); None: none.

    Returns:
        The reading.

    Raises:
        ValueError: If a row is too long for the policy, its output has not the expected shape, or noise is asked for
            and cannot be added.
    """
    ability, tokens = prepare(policy), segments.tokens
    if tokens == 0:
        segments = _one_token(segments)
    model = language_model(policy)
    check_length(policy, segments.longest, "a row")
    head = find_head(model) if ability.hidden_states else None
    if head is None and model is not None and classifies(model):
        raise ValueError(
            f"policy {type(model).__name__} cannot be read: its head `score` must be a linear map of the last hidden "
            f"state ({ability.reason})"
        )
    noise = None if neftune_alpha is None else EmbeddingNoise(policy, segments, neftune_alpha).at

    def compute() -> States:
        linear: Any = None if head is None else head.linear
        if linear is not None and is_sharded(linear):  # apart from the rest: nothing else would gather it
            linear.unshard()
        if ability.packed and (ability.window is None or segments.longest <= ability.window):
            trim = ability.trims_last_layer and not routers
            return packed_states(model, segments, hidden=head is not None, trim=trim, noise=noise)
        return padded_states(policy, segments, hidden=head is not None, noise=noise)

    with offloaded(policy):
        states, routed = forward_pass(policy, compute)
    # A stand-in's token is no token.
    return Reading(states, head, segments, tuple(x[:0] if tokens == 0 else x for x in routed) if routers else ())


def _one_token(segments: Segments) -> Segments:
    """A stand-in for a batch without reads: the policy still runs, and its parameters stay in the graph."""
    zero = segments.token_ids.new_zeros(1)
    return replace(segments, token_ids=zero, position_ids=zero, lengths=(1,), parents=(-1,), given_lengths=(1,))
