"""What is trained: loading, adapting, freezing, reading, scoring and exporting a causal language model."""

from alignment_modules.policies.divergence import divergence
from alignment_modules.policies.export import export_policy
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.policies.frozen import Frozen, frozen_companion
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.modes import disable_dropout
from alignment_modules.policies.probing import Capabilities, prepare
from alignment_modules.policies.reading import Reading, read
from alignment_modules.policies.scoring import Scores, score
from alignment_modules.policies.segments import Segments
from alignment_modules.policies.tokenizers import check_vocabulary, load_tokenizer
from alignment_modules.policies.value_head import ValueHead

__all__ = [
    "Capabilities",
    "Frozen",
    "LoraConfig",
    "PolicyConfig",
    "Reading",
    "Scores",
    "Segments",
    "ValueHead",
    "build_policy",
    "check_vocabulary",
    "disable_dropout",
    "divergence",
    "export_policy",
    "fingerprint",
    "frozen_companion",
    "load_tokenizer",
    "prepare",
    "read",
    "score",
]
