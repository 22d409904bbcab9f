"""How completions are made: engines and their decoders, and the actor that has completions judged."""

from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.parameters import SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.sampler import Completions, NonFiniteLogits, sample
from alignment_modules.rollouts.seeds import Seeds

__all__ = ["Codec", "Completions", "NonFiniteLogits", "Prompts", "SamplingParameters", "Seeds", "sample"]
