"""Sampling from policies."""

from alignment_modules.rollouts.sampler import Completions, NonFiniteLogits, SamplingParameters, sample

__all__ = ["Completions", "NonFiniteLogits", "SamplingParameters", "sample"]
