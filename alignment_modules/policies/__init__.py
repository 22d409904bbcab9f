"""What is trained: loading, adapting, freezing, reading, scoring and exporting a causal language model."""

from alignment_modules.policies.export import export_policy
from alignment_modules.policies.load import LoraConfig, PolicyConfig, build_policy
from alignment_modules.policies.probing import Capabilities, prepare
from alignment_modules.policies.reading import Reading, read
from alignment_modules.policies.reference import build_reference, disable_dropout, fingerprint, reference_mode
from alignment_modules.policies.scoring import Scores, score
from alignment_modules.policies.segments import Segments
from alignment_modules.policies.tokenizers import check_vocabulary, load_tokenizer
from alignment_modules.policies.value_head import ValueHead

__all__ = [
    "Capabilities",
    "LoraConfig",
    "PolicyConfig",
    "Reading",
    "Scores",
    "Segments",
    "ValueHead",
    "build_policy",
    "build_reference",
    "check_vocabulary",
    "disable_dropout",
    "export_policy",
    "fingerprint",
    "load_tokenizer",
    "prepare",
    "read",
    "reference_mode",
    "score",
]
