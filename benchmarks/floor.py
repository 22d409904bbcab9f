"""The arithmetic floor: the multiplications of a step without waste, at the speed this machine multiplies matrices.

Counted are matrix products alone, each once: no padding, a shared prompt once, every layer for every token, the head on
scored tokens only, causal attention as half a square; forward 2 operations per weight and token, backward 4. Under LoRA
a frozen weight has no gradient and costs 2 backward. A step that reached the floor would spend nothing on elementwise
work, the optimizer, memory or Python. It is no bound: whoever leaves the last layer out where nothing is read (as we do
with its feed-forward block) needs fewer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import workload
from workload import GROUPS, SIZES


def matrix_speed(timer: Callable[[], float] = time.perf_counter, size: int = 1024, repeats: int = 12) -> float:
    """Operations per second of a float32 product of two `size` x `size` matrices on this process's threads, the median.

    Measured in the process that is timed, by its own clock: what slows one on a busy machine slows the other.
    """
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(1 + repeats):
        began = timer()
        torch.mm(a, b)
        seconds.append(timer() - began)
    return 2 * size**3 / statistics.median(seconds[1:])


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a forward pass.

    Attributes:
        weights: with the model's own matrices, the head among them.
        attention: of queries with keys, and of probabilities with values.
        adapters: with LoRA's factors.
    """

    weights: float
    attention: float
    adapters: float

    def forward(self, *, lora: bool = False) -> float:
        """Operations of a pass without gradient, with the adapters or without."""
        return 2 * (self.weights + self.attention + (self.adapters if lora else 0.0))

    def train(self, *, lora: bool = False) -> float:
        """Operations of a forward and a backward pass that move all weights, or the adapters."""
        if not lora:
            return 6 * (self.weights + self.attention)
        return 4 * self.weights + 6 * (self.attention + self.adapters)


def work(model: dict[str, Any], tokens: float, pairs: float, scored: float) -> Work:
    """A forward pass.

    Args:
        model: keys of its configuration.
        tokens: positions.
        pairs: (query, key) pairs that are attended to, in total.
        scored: positions that the output head sees.
    """
    hidden, inner, layers = model["hidden_size"], model["intermediate_size"], model["num_hidden_layers"]
    narrow = hidden * model["num_key_value_heads"] // model["num_attention_heads"]
    maps = 2 * [(hidden, hidden)] + 2 * [(hidden, narrow)] + 3 * [(hidden, inner)]
    weights = layers * tokens * sum(wide * high for wide, high in maps)
    adapters = layers * tokens * sum(workload.LORA["r"] * (wide + high) for wide, high in maps)
    return Work(weights + scored * hidden * model["vocab_size"], layers * 2 * pairs * hidden, adapters)


def tree(prompt: float, completions: Sequence[float]) -> tuple[float, float]:
    """Positions and attended pairs of a prompt with completions that share it."""
    pairs = prompt**2 / 2 + sum(length * prompt + length**2 / 2 for length in completions)
    return prompt + sum(completions), pairs


def row_operations(
    method: str, model: dict[str, Any], prompt: int, completions: Sequence[float], *, lora: bool, beta: float
) -> float:
    """Operations of one row, a sequence, a pair, or a prompt with its samples, without those of DPO's reference."""
    scored = {"reward": 0.0, "orpo": prompt - 1 + sum(completions)}.get(method, sum(completions))
    whole = work(model, *tree(prompt, completions), scored)
    total = whole.train(lora=lora)
    if method in GROUPS:
        total += whole.forward(lora=lora) + (whole.forward() if beta else 0)  # sampling, and the reference
    return total


def reference_operations(model: dict[str, Any], prompt: int, completions: Sequence[float]) -> float:
    """Operations of a frozen reference that scores completions of one prompt."""
    return work(model, *tree(prompt, completions), sum(completions)).forward()


def divergence_operations(model: dict[str, Any], prompt: int, own: int, other: int, *, lora: bool) -> float:
    """Operations of KTO's estimate: the policy scores another row's completion, the reference that and the row's own.

    The prompt's states are there in both.
    """
    more = work(model, other, other * prompt + other**2 / 2, other)
    return more.forward(lora=lora) + reference_operations(model, prompt, [own, other])


def step_operations(
    method: str,
    rows: Sequence[dict[str, Any]],
    size: str,
    *,
    lora: bool = False,
    beta: float = 0.0,
    cached: bool = False,
    sampled: float = 0.0,
) -> float:
    """Mean operations of an optimizer step.

    Args:
        method: one of `workload.METHODS`.
        rows: the rows of the measured steps.
        size: one of `workload.SIZES`.
        lora: adapters alone are trained.
        beta: KL coefficient of what samples; not 0: the reference scores too.
        cached: DPO's reference is not computed.
        sampled: mean length of the samples, tokens.
    """
    model, batch = SIZES[size].model, SIZES[size].batch[method]
    total = 0.0
    counts = [{name: len(text.split()) for name, text in row.items() if name != "label"} for row in rows]
    for number, count in enumerate(counts):
        prompt = count["prompt"]
        completions = [length + 1 for name, length in count.items() if name != "prompt"]
        lengths = [sampled] * GROUPS[method] if method in GROUPS else completions
        total += row_operations(method, model, prompt, lengths, lora=lora, beta=beta)
        if method == "dpo" and not cached:
            total += reference_operations(model, prompt, completions)
        if method == "kto":
            step = number // batch * batch
            other = counts[step + (number - 1 - step) % batch]["completion"] + 1
            total += divergence_operations(model, prompt, completions[0], other, lora=lora)
    return total * batch / len(rows)
