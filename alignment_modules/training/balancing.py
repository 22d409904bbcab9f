"""The load-balancing loss of a mixture of experts beside a paradigm's own, exact over an optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.functional.router import expert_counts, load_balancing_loss, router_shares
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.reading import Reading, read
from alignment_modules.policies.router import Router, find_router
from alignment_modules.policies.segments import Segments
from alignment_modules.training.objective import Objective, Term
from alignment_modules.training.updates import UpdateModule

SHARES = "router_shares"


class ExpertBalance:
    """Adds the loss to the objectives of an `UpdateModule`, as a term whose unit is the token.

    The tokens are those that the policy computes: all on which a target depends. A row's last token, and what stands
    behind its last target, is not computed and not counted.

    Args:
        router: How the policy's experts are balanced.
    """

    def __init__(self, router: Router) -> None:
        self.router = router

    @classmethod
    def of(cls, policy: nn.Module) -> ExpertBalance | None:
        """That of a policy whose configuration asks for the loss (`find_router`); None for any other."""
        router = find_router(policy)
        return None if router is None else cls(router)

    def give_shares(
        self, module: UpdateModule, pieces: Sequence[Mapping[str, Any]], *, neftune_alpha: float | None = None
    ) -> list[dict[str, Any]]:
        """Gives each piece the shares of tokens that the experts get over the whole step, for `before_updates`.

        The pass that counts draws the dropout and the noise that the passes with gradients are going to draw.

        Args:
            module: Whose step, with its `policy` and `segments`.
            pieces: The micro-batches of this rank.
            neftune_alpha: Of the noise that the objective asks for.
        """
        if len(pieces) == 1 and module.trainer.world_size == 1:  # the only forward pass counts for itself
            return [dict(piece) for piece in pieces]
        with torch.no_grad(), _same_draws(module.device):
            segments = [piece.get("segments") or module.segments(piece) for piece in pieces]
            options: Any = {"routers": True, "neftune_alpha": neftune_alpha}
            counts = _total(self._counts(read(module.policy, own, **options)) for own in segments)
        shares = router_shares(module.reduce(counts, "sum"), self.router.top_k)
        return [{**piece, SHARES: shares} for piece in pieces]

    def units(self, own: Mapping[str, Tensor], segments: Segments) -> dict[str, Tensor]:
        """The units of a paradigm's own terms and those of this one."""
        return {**own, "router": torch.tensor(segments.tokens)}

    def add(self, objective: Objective, reading: Reading, shares: Tensor | None) -> Objective:
        """The objective with the loss as one more term, and with its mean in `router_loss` and `loss`.

        Args:
            objective: Of one term.
            reading: Made with `routers=True`.
            shares: [experts], of the whole step; None: those of this reading.
        """
        layers = reading.router_logits
        if shares is None:
            shares = router_shares(self._counts(reading), self.router.top_k)
        total = torch.stack([load_balancing_loss(layer, shares).sum() for layer in layers]).mean()
        [(name, own)] = objective.terms.items()
        term = Term(total, torch.tensor(len(layers[0]), device=total.device), self.router.coefficient)
        units = torch.stack([own.weight.to(total), term.weight.to(total)])
        both = torch.stack([own.scaled.detach().to(total), -term.scaled.detach()])
        more = {"loss": Statistic(both, units, "difference"), "router_loss": Statistic(total.detach(), term.weight)}
        return replace(objective, terms={name: own, "router": term}, statistics=objective.statistics | more)

    def _counts(self, reading: Reading) -> Tensor:
        return _total(expert_counts(layer, self.router.top_k) for layer in reading.router_logits)

    def describe(self) -> str:
        """The loss, for people."""
        return (
            f"load balancing of {self.router.top_k} experts a token with weight {self.router.coefficient}, its shares "
            "and its mean over the computed tokens of the optimizer step, over all micro-batches and ranks"
        )


def _total(counts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(counts)).sum(0)


def _same_draws(device: torch.device) -> AbstractContextManager[None]:
    """Afterwards the generators of the host and of a device stand where they stood."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)
