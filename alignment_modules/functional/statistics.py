"""One number to log, as a sum and the number of its units.

A mean of means depends on how a batch was cut into micro-batches and ranks; a sum and a count do not. So what is logged
travels as `(total, weight)` and is divided once, after everything was added up.
"""

from typing import Literal, NamedTuple

from torch import Tensor

Kind = Literal["mean", "std", "var", "gap", "difference", "sum", "explained", "source", "min", "max"]


class Statistic(NamedTuple):
    """One number to log.

    Attributes:
        total: 0-dim tensor: the sum over the units (kind "mean") or the extreme value itself ("min", "max"). Of the
            sample deviation ("std") or variance ("var") [2]: their sum and that of their squares. Of the mean size of
            sums that may cancel within a bin and not across ("gap") [bins]: each bin's sum. Of one mean less another
            ("difference") [2]: the sum of either's units. Of the sum of means ("sum") [terms]: the sum of each one's
            units. Of the share of the targets' variance that estimates explain ("explained") [4]: the sums of errors,
            of their squares, of targets and of their squares. Of rows of one source ("source"), of which a process
            may have none, as "sum".
        weight: 0-dim tensor or number: how many units were summed ("difference" [2], "sum" and "source" [terms]); not
            of extremes.
        kind: How the values of micro-batches and ranks combine.
    """

    total: Tensor
    weight: Tensor | float = 1.0
    kind: Kind = "mean"


class RowSums(NamedTuple):
    """What a mean is made of, row by row, so that it can also be told of some rows alone.

    Attributes:
        totals: `[rows]`, or `[terms, rows]` of a sum of means: each row's sum over its units.
        weights: Of the same shape: how many units each row has.
    """

    totals: Tensor
    weights: Tensor

    @property
    def mean(self) -> Statistic:
        """The mean over the units of all rows `[rows]`."""
        return Statistic(self.totals.detach().sum(), self.weights.sum())
