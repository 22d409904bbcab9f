"""How completions are made: engines and their decoders, and the actor that has completions judged."""

from alignment_modules.rollouts.parameters import SamplingParameters
from alignment_modules.rollouts.sampler import Completions, NonFiniteLogits, sample

__all__ = ["Completions", "NonFiniteLogits", "SamplingParameters", "sample"]
