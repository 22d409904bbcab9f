"""What is trained: loading, adapting, freezing, scoring and exporting a causal language model."""

from alignment_modules.policies.export import export_policy
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy, check_vocabulary, load_tokenizer
from alignment_modules.policies.reference import build_reference, disable_dropout, fingerprint, reference_mode
from alignment_modules.policies.scoring import Capabilities, Scores, capabilities, score
from alignment_modules.policies.segments import Segments

__all__ = [
    "Capabilities",
    "LoraConfig",
    "PolicyConfig",
    "Scores",
    "Segments",
    "build_policy",
    "build_reference",
    "capabilities",
    "check_vocabulary",
    "disable_dropout",
    "export_policy",
    "fingerprint",
    "load_tokenizer",
    "reference_mode",
    "score",
]
