"""What every module has beside its objective: checkpoints of plain arguments, guarded clipping, sums over ranks."""

from alignment_modules.clipping import GuardedClipping
from alignment_modules.hyperparameters import PlainHyperparameters
from alignment_modules.ranks import RankReductions


class ModuleParts(PlainHyperparameters, GuardedClipping, RankReductions):
    """The three together."""
