"""Post-training for language models: every paradigm is a LightningModule."""

from alignment_modules.base import AlignmentModule
from alignment_modules.dpo import DPOModule
from alignment_modules.evaluation import EvaluationConfig
from alignment_modules.factory import create_module, get_module_class
from alignment_modules.functional.statistics import Statistic
from alignment_modules.grpo import GRPOModule
from alignment_modules.paradigms.kto import KTOModule
from alignment_modules.paradigms.reward import RewardModule
from alignment_modules.policies.load import LoraConfig, PolicyConfig
from alignment_modules.pretrain import PretrainModule
from alignment_modules.sft import SFTModule
from alignment_modules.training.objective import Objective

__all__ = [
    "AlignmentModule",
    "DPOModule",
    "EvaluationConfig",
    "GRPOModule",
    "KTOModule",
    "LoraConfig",
    "Objective",
    "PolicyConfig",
    "PretrainModule",
    "RewardModule",
    "SFTModule",
    "Statistic",
    "create_module",
    "get_module_class",
]
