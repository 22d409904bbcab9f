"""Tokens that a policy-gradient step treats apart, chosen among those of all its micro-batches and ranks."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignment_modules.functional import Surrogate, high_covariance, top_quantile
from alignment_modules.functional.surrogate import per_token_advantages
from alignment_modules.policies.modes import reading_mode
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.rollouts.seeds import token_draws
from alignment_modules.training.acting import ActingModule


@torch.no_grad()
def mark_covariant(
    module: ActingModule, surrogate: Surrogate, pieces: Sequence[Rollout], *, known: bool
) -> list[Rollout]:
    """Sets `covariant` of the pieces of one optimizer step, among its trained tokens on all ranks.

    Args:
        module: Whose policy takes the step.
        surrogate: The loss, one that treats tokens of high covariance apart.
        pieces: This rank's micro-batches, the same number on each rank.
        known: Whether the sampled log-probabilities are those of the policy as it is where `old_logps` is None.

    Returns:
        As many pieces.
    """
    found = []
    with reading_mode(module.policy) as policy:
        for piece in pieces:
            if known and piece.old_logps is None and not bool(piece.sampled_logps[piece.trained].isnan().any()):
                logps = piece.sampled_logps
            else:
                logps = module.score_piece(policy, piece, piece.trained).token_logps
            found.append(_told(module, surrogate, piece, logps))
    chosen = module.over_ranks(
        torch.cat(found), lambda rows: high_covariance(surrogate, rows[:, 0], rows[:, 1], rows[:, 2] > 0, rows[:, 3])
    )
    marked = []
    for piece, own in zip(pieces, chosen.split([len(rows) for rows in found]), strict=True):
        covariant = torch.zeros(piece.trained.shape, dtype=torch.bool, device=own.device)
        covariant[piece.trained.to(own.device)] = own
        marked.append(replace(piece, covariant=covariant))
    return marked


def _told(module: ActingModule, surrogate: Surrogate, piece: Rollout, logps: Tensor) -> Tensor:
    """[trained tokens, 4] float64: log-probability, advantage, whether the ratio is clipped, a random number."""
    mask, advantages = piece.trained.to(module.device), piece.advantages
    if advantages is None:
        raise ValueError("advantages=None: a covariance with them needs some")
    weight, logps = per_token_advantages(advantages.to(module.device), logps), logps.to(module.device)
    old = logps if piece.old_logps is None else piece.old_logps
    clipped = surrogate.clip_masks(logps, old, weight, mask).region
    rows = piece.prompt_ids, piece.prompt_mask, piece.ids, piece.mask
    draws = token_draws(module.actor.seed, module.global_step, *rows).to(module.device)
    return torch.stack([values[mask].double() for values in (logps, weight, clipped, draws)], dim=-1)


@torch.no_grad()
def top_entropy(module: ActingModule, rollout: Rollout, entropies: Tensor, share: float) -> Tensor:
    """[N, T] float32: 1 for the trained tokens whose entropy is among the highest of the rollout, on all ranks; else 0.

    Args:
        module: Whose policy wrote the rollout.
        rollout: Of the whole batch on this rank.
        entropies: [N, T] in nats, of the policy that wrote it.
        share: How many of the tokens.
    """
    trained = rollout.trained.to(entropies.device)
    weights = torch.zeros_like(entropies)
    weights[trained] = module.over_ranks(entropies[trained], lambda every: top_quantile(every, share)).to(weights)
    return weights
