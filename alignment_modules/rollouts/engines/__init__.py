"""Engines make completions: today's sampler in this process, or a server that keeps the same promises elsewhere."""

from alignment_modules.rollouts.engines.in_process import InProcessEngine
from alignment_modules.rollouts.engines.protocol import Engine, EngineError, Session
from alignment_modules.rollouts.engines.vllm import VLLMEngine

__all__ = ["Engine", "EngineError", "InProcessEngine", "Session", "VLLMEngine"]
