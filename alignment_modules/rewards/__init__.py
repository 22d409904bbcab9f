"""How completions are judged: verifiers, reward models and the user's own functions, combined by `RewardSet`."""

from alignment_modules.rewards.model import SequenceClassifier
from alignment_modules.rewards.patient import PatientReward
from alignment_modules.rewards.protocol import RewardError, RewardFunction, RewardTable
from alignment_modules.rewards.reward_set import RewardSet
from alignment_modules.rewards.verifiers import ExactMatch, NumericAnswer, RegexMatch, SoftOverlong

__all__ = [
    "ExactMatch",
    "NumericAnswer",
    "PatientReward",
    "RegexMatch",
    "RewardError",
    "RewardFunction",
    "RewardSet",
    "RewardTable",
    "SequenceClassifier",
    "SoftOverlong",
]
