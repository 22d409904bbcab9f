"""What is trained: loading, adapting, freezing, scoring and exporting a causal language model."""

from alignment_modules.policies.export import export_policy
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.policies.frozen import Frozen, frozen_companion
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy, check_vocabulary, load_tokenizer
from alignment_modules.policies.modes import disable_dropout
from alignment_modules.policies.scoring import Capabilities, Scores, capabilities, score
from alignment_modules.policies.segments import Segments

__all__ = [
    "Capabilities",
    "Frozen",
    "LoraConfig",
    "PolicyConfig",
    "Scores",
    "Segments",
    "build_policy",
    "capabilities",
    "check_vocabulary",
    "disable_dropout",
    "export_policy",
    "fingerprint",
    "frozen_companion",
    "load_tokenizer",
    "score",
]
