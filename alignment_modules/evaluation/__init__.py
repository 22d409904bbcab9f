"""How a policy is measured: by what it writes."""

from alignment_modules.evaluation.config import EvaluationConfig
from alignment_modules.evaluation.evaluator import Evaluator, Measured

__all__ = ["EvaluationConfig", "Evaluator", "Measured"]
