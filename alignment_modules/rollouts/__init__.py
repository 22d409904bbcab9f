"""Sampling from policies."""

from alignment_modules.rollouts.sampler import Completions, SamplingParameters, sample

__all__ = ["Completions", "SamplingParameters", "sample"]
