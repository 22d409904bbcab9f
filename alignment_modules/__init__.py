"""Post-training for language models: every paradigm is a LightningModule."""

import importlib.metadata

from alignment_modules import paradigms
from alignment_modules.evaluation import EvaluationConfig
from alignment_modules.functional.statistics import Statistic
from alignment_modules.paradigms import *  # noqa: F403 its `__all__` says which
from alignment_modules.policies.load import LoraConfig, PolicyConfig
from alignment_modules.training.module import AlignmentModule
from alignment_modules.training.objective import Objective

__all__ = ["AlignmentModule", "EvaluationConfig", "LoraConfig", "Objective", "PolicyConfig", "Statistic"]
__all__ += paradigms.__all__

try:
    __version__ = importlib.metadata.version("alignment-modules")
except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
