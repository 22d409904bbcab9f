"""Batches whose rows are from several sources: weights of the rows' loss, and what is logged of each source."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignment_modules.functional.sources import SOURCES, by_source
from alignment_modules.functional.statistics import RowSums, Statistic
from alignment_modules.training.objective import Objective, Term

if TYPE_CHECKING:
    from alignment_modules.training.module import AlignmentModule

SOURCE_WEIGHTS = "source_weights"
"""A batch's tensor [rows] of what the loss of each row is multiplied with."""


def of_sources(objective: Objective, piece: Any) -> Objective:
    """An objective with the weights of its rows, which also tells of each source by itself.

    A row's weight is a factor of its loss and of its number of units alike, in each term: what is minimised is a
    weighted mean. The loss is logged as it is minimised; of one source, without the weights.

    Args:
        objective: Of the piece, with the `rows` of its terms.
        piece: A batch, or a rollout, with or without `source_name` and `source_weights`.

    Raises:
        ValueError: If rows have weights and the objective does not tell what each row adds.
    """
    sources, weights = _told(piece, SOURCES), _told(piece, SOURCE_WEIGHTS)
    if sources is None and weights is None:
        return objective
    known = [term for term in objective.terms.values() if term.rows is not None]
    terms, statistics = objective.terms, dict(objective.statistics)
    if weights is not None:
        if not known:
            raise ValueError(
                f"a batch holds `{SOURCE_WEIGHTS}`, and this objective does not tell what each row adds to its sum: "
                "build it with Objective.of_rows(losses, units), both [rows]"
            )
        terms = {name: _weighed(term, weights) for name, term in terms.items()}
        if objective.name in statistics:
            statistics[objective.name] = loss_of(terms)
    if sources is not None:
        sums = dict(objective.rows)
        if known and objective.name in statistics:
            sums[objective.name] = _together(known)
        statistics |= by_source(sums, sources)
    return replace(objective, terms=terms, statistics=statistics)


def loss_of(terms: Mapping[str, Term]) -> Statistic:
    """The value of an objective: the sum of its terms' means, each times its coefficient."""
    totals = [term.scaled.detach().double() for term in terms.values()]
    weights = [term.weight.detach().double() for term in terms.values()]
    if len(totals) == 1:
        return Statistic(totals[0], weights[0])
    return Statistic(torch.stack(totals), torch.stack([one.to(totals[0].device) for one in weights]), "sum")


def weigh_units(units: Mapping[str, Tensor], piece: Any) -> dict[str, Tensor]:
    """The units of each term of a piece, 0-dim, by the weights of its rows where it has some.

    Args:
        units: What `UpdateModule.units` counted: [rows], or 0-dim where rows have no part in it.
        piece: As in `of_sources`.

    Raises:
        ValueError: If rows have weights, and no term's units are counted by row.
    """
    weights = _told(piece, SOURCE_WEIGHTS)
    if weights is not None and not any(count.dim() for count in units.values()):
        raise ValueError(f"a batch holds `{SOURCE_WEIGHTS}`, and units(piece) does not count by row: return [rows]")
    return {
        name: (count if weights is None else count * _per_row(weights, count)).sum() if count.dim() else count
        for name, count in units.items()
    }


def gather_names(module: "AlignmentModule", names: dict[str, int]) -> list[dict[str, int]]:
    """What each process has, in rank order, for `Meters.compute`."""
    if module._trainer is None or module.trainer.world_size == 1:
        return [names]
    found: list[Any] = [None] * module.trainer.world_size
    torch.distributed.all_gather_object(found, names)
    return found


def check_sources(batch: Mapping[str, Any]) -> None:
    """Checks the sources and weights of rows that a batch brings, if it does, while it is on the host.

    Raises:
        ValueError: If a source's name is no text, empty or has a slash, there is another number of weights than of
            sources, or a weight is negative or not finite.
    """
    weights, sources = batch.get(SOURCE_WEIGHTS), batch.get(SOURCES)
    for row, name in enumerate(sources or ()):
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"row {row} of a batch has {SOURCES}={name!r}; it must be a text, not empty and without /")
    if weights is None:
        return
    if not isinstance(weights, Tensor) or weights.dim() != 1 or (sources is not None and len(weights) != len(sources)):
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"`{SOURCE_WEIGHTS}` must be a tensor with one number a row, got {shape}")
    wrong = (~((weights >= 0) & weights.isfinite())).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        whose = f" (source {sources[row]!r})" if sources else ""
        raise ValueError(
            f"`{SOURCE_WEIGHTS}` is {float(weights[row]):g} in row {row} of a batch{whose}; a weight must be a finite "
            "number of at least 0"
        )


def _weighed(term: Term, weights: Tensor) -> Term:
    if term.rows is None:
        return term
    factors = _per_row(weights, term.rows.totals)
    return Term.of_rows(term.rows.totals * factors, term.rows.weights * factors, term.coefficient)


def _per_row(weights: Tensor, rows: Tensor) -> Tensor:
    """Weights [R] for as many rows, or for R times as many beside each other."""
    if not len(weights):
        return rows.new_ones(len(rows), dtype=torch.float32)
    if len(rows) % len(weights):
        raise ValueError(f"`{SOURCE_WEIGHTS}` has {len(weights)} weights for {len(rows)} rows")
    return weights.to(rows.device, torch.float32, non_blocking=True).repeat_interleave(len(rows) // len(weights))


def _together(terms: list[Term]) -> RowSums:
    """The terms whose rows are known, each times its coefficient; one alone as it is."""
    sums: list[Any] = [(term.rows.totals.detach() * term.coefficient, term.rows.weights) for term in terms if term.rows]
    if len(sums) == 1:
        return RowSums(*sums[0])
    return RowSums(*(torch.stack(values) for values in zip(*sums, strict=True)))


def _told(piece: Any, name: str) -> Any:
    return piece.get(name) if isinstance(piece, Mapping) else getattr(piece, name, None)
