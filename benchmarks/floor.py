"""The arithmetic floor: the least multiplications a step needs, at the speed this machine multiplies matrices.

Counted are matrix products alone, each once: no padding, a shared prompt once, the head on scored tokens only, causal
attention as half a square; forward 2 operations per weight and token, backward 4. A step that reached the floor would
spend nothing on elementwise work, the optimizer, memory or Python.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import workload
from workload import GROUP, MODEL

FORWARD, TRAIN = 2, 6


def matrix_speed(threads: int, size: int = 1024, seconds: float = 1.0) -> float:
    """Operations per second of a float32 product of two `size` x `size` matrices, the best of what fits the time."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def body(tokens: float, pairs: float) -> float:
    """Multiply-adds of the layers for `tokens` positions that attend to `pairs` (query, key) pairs in total."""
    hidden, inner, layers = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["num_hidden_layers"]
    narrow = hidden * MODEL["num_key_value_heads"] // MODEL["num_attention_heads"]
    weights = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * inner
    return layers * (tokens * weights + 2 * pairs * hidden)


def head(tokens: float) -> float:
    """Multiply-adds of the output head for `tokens` scored positions."""
    return tokens * MODEL["hidden_size"] * MODEL["vocab_size"]


def tree(prompt: int, completions: Sequence[int]) -> tuple[float, float]:
    """Positions and attended pairs of a prompt with completions that share it."""
    pairs = prompt**2 / 2 + sum(length * prompt + length**2 / 2 for length in completions)
    return prompt + sum(completions), pairs


def row_operations(method: str, prompt: int, completions: Sequence[int], beta: float, cached: bool) -> float:
    """Operations of one row: a sequence, a pair, or a prompt with its samples."""
    layers, scored = body(*tree(prompt, completions)), head(sum(completions))
    passes = TRAIN
    if method == "grpo":
        passes += FORWARD + (FORWARD if beta else 0)  # sampling, and the reference
    if method == "dpo" and not cached:
        passes += FORWARD
    return passes * (layers + scored)


def step_operations(
    method: str, rows: Sequence[dict[str, str]], *, beta: float = 0.0, cached: bool = False, sampled: float = 0.0
) -> float:
    """Mean operations of an optimizer step.

    Args:
        method: "sft", "dpo" or "grpo".
        rows: the rows of the measured steps.
        beta: GRPO's KL coefficient; not 0: the reference scores too.
        cached: DPO's reference is not computed.
        sampled: GRPO: mean length of the samples, tokens.
    """
    total = 0.0
    for row in rows:
        count = {name: len(text.split()) for name, text in row.items()}
        prompt = count.pop("prompt")
        completions = [sampled] * GROUP if method == "grpo" else [length + 1 for length in count.values()]
        total += row_operations(method, prompt, completions, beta, cached)  # type: ignore[arg-type]
    return total * workload.BATCH[method] / len(rows)
