"""Post-training for language models: every paradigm is a LightningModule."""

from alignment_modules import paradigms
from alignment_modules.evaluation import EvaluationConfig
from alignment_modules.functional.statistics import Statistic
from alignment_modules.paradigms import *  # noqa: F403 its `__all__` says which
from alignment_modules.policies.load import LoraConfig, PolicyConfig
from alignment_modules.training.module import AlignmentModule
from alignment_modules.training.objective import Objective

__all__ = ["AlignmentModule", "EvaluationConfig", "LoraConfig", "Objective", "PolicyConfig", "Statistic"]
__all__ += paradigms.__all__
