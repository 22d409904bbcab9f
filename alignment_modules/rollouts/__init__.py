"""Sampling from policies."""

from alignment_modules.rollouts.parameters import SamplingParameters
from alignment_modules.rollouts.sampler import Completions, NonFiniteLogits, sample

__all__ = ["Completions", "NonFiniteLogits", "SamplingParameters", "sample"]
