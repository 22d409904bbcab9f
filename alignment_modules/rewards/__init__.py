"""How completions are judged: verifiers, reward models and the user's own functions, combined by `RewardSet`."""

from alignment_modules.rewards.judge import ChatJudge
from alignment_modules.rewards.model import SequenceClassifier
from alignment_modules.rewards.patient import PatientReward
from alignment_modules.rewards.protocol import FinalRewardError, RewardError, RewardFunction, RewardTable
from alignment_modules.rewards.reasoning_gym import ReasoningGymScore
from alignment_modules.rewards.reward_set import RewardSet
from alignment_modules.rewards.verifiers import ExactMatch, NumericAnswer, RegexMatch, SoftOverlong

__all__ = [
    "ChatJudge",
    "ExactMatch",
    "FinalRewardError",
    "NumericAnswer",
    "PatientReward",
    "ReasoningGymScore",
    "RegexMatch",
    "RewardError",
    "RewardFunction",
    "RewardSet",
    "RewardTable",
    "SequenceClassifier",
    "SoftOverlong",
]
