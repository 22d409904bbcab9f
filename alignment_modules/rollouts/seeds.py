"""Random numbers that belong to a sample, not to its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which `numpy.random.Philox` runs.
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@dataclass(frozen=True)
class Seeds:
    """What the samples of a rollout are seeded with: sample `g` of prompt index `i` with `(seed, step, draw, i, g)`.

    Attributes:
        indices: Identity of each prompt, not negative; equal ones draw alike.
        seed: Base seed, not negative.
        step: Counter of rollouts under this seed, e.g. the optimizer step, not negative.
        draw: Which of several rollouts at this step, from 0: prompts that come again in it are answered anew.
    """

    indices: Sequence[int]
    seed: int = 0
    step: int = 0
    draw: int = 0

    def uniforms(self, num_samples: int, length: int, turn: int = 0) -> Tensor:
        """`sample_uniforms` of these seeds."""
        return sample_uniforms(self.seed, self.step, self.indices, num_samples, length, turn, self.draw)

    def of_prompt(self, index: int) -> int:
        """A number for what all samples of a prompt share, such as what an environment draws at its reset.

        Args:
            index: The prompt's.

        Returns:
            From 0 to 2**31 - 1, which every generator takes.
        """
        parts = (self.seed, self.step, self.draw, index)
        return int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0] >> np.uint32(1))

    def number(self, index: int, sample: int, turn: int = 0) -> int:
        """One sample's seed as a number, for engines that draw with a generator of their own.

        Args:
            index: The prompt's.
            sample: Which of its samples.
            turn: Which of the sample's turns.

        Returns:
            From 0 to 2**63 - 1.

        >>> Seeds([4, 7], seed=1).number(7, 0) == Seeds([7], seed=1).number(7, 0) != Seeds([7], seed=2).number(7, 0)
        True
        """
        parts = (self.seed, self.step, self.draw, index, sample, turn)
        return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sample_uniforms(
    seed: int,
    step: int,
    prompt_indices: Sequence[int],
    num_samples: int,
    length: int,
    turn: int = 0,
    draw: int = 0,
) -> Tensor:
    """Draws the uniforms that decide every token of every sample, up front.

    Sample `g` of prompt index `i` gets what numpy's `Generator(Philox(key=key, counter=[0, g, i, turn]))` gives with
    `.random(length)` and `key = SeedSequence((seed, step, draw)).generate_state(2, uint64)` (for draw 0 that of
    `(seed, step)`), whatever else is in the batch, so that a rollout can be replayed alone. All rows are computed at
    once here, because one numpy generator per row costs more than sampling from a small model.

    Args:
        seed: Base seed, not negative.
        step: Rollout counter, not negative, e.g. the optimizer step.
        prompt_indices: Identity of each prompt, not negative. Equal indices give equal uniforms.
        num_samples: Samples per prompt, `G`.
        length: Uniforms per sample.
        turn: Which of a sample's turns, from 0: each draws numbers of its own.
        draw: Which of several rollouts at this step, from 0, likewise.

    Returns:
        `[prompts * num_samples, length]` float64 in [0, 1), row `p * num_samples + g`.

    Raises:
        ValueError: If a seed, the step or an index is negative.

    >>> alone = sample_uniforms(7, 3, [5], 1, 4)
    >>> batch = sample_uniforms(7, 3, [9, 5], 2, 6)
    >>> bool((batch[2, :4] == alone[0]).all())
    True
    """
    for name, value in (("seed", seed), ("step", step), ("prompt_indices", min(prompt_indices, default=0))):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}.")
    rows, blocks = len(prompt_indices) * num_samples, -(-length // 4)
    key = np.random.SeedSequence((seed, step, draw)).generate_state(2, np.uint64)
    counter = [np.zeros((rows, blocks), dtype=np.uint64) for _ in range(4)]
    counter[0] += np.arange(1, blocks + 1, dtype=np.uint64)  # numpy counts before it draws
    counter[1] += np.tile(np.arange(num_samples, dtype=np.uint64), len(prompt_indices))[:, None]
    counter[2] += np.repeat(np.asarray(prompt_indices, dtype=np.uint64), num_samples)[:, None]
    counter[3] += np.uint64(turn)
    words = np.stack(_philox(counter, key), axis=-1).reshape(rows, blocks * 4)[:, :length]
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def token_draws(seed: int, step: int, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Random numbers that belong to a token: to its prompt, its completion and its place, and to nothing beside these.

    Equal completions of equal prompts draw alike. Padding, and what else is in the batch, change nothing.

    Args:
        seed: Base seed, not negative.
        step: Not negative, e.g. the optimizer step.
        prompt_ids: `[prompts, time]` int64, on the host.
        prompt_mask: `[prompts, time]` bool, on the host.
        ids: `[completions, time]` int64, on the host; as many of each prompt, beside each other.
        mask: `[completions, time]` bool, on the host.

    Returns:
        `[completions, time]` float64 in [0, 1).

    >>> one = torch.ones(1, 1, dtype=torch.long)
    >>> draws = token_draws(0, 0, one, one.bool(), torch.tensor([[4, 5]]), torch.tensor([[True, True]]))
    >>> bool(draws[0, 0] != draws[0, 1])
    True
    """
    group = len(ids) // max(len(prompt_ids), 1)
    base = np.random.SeedSequence((seed, step)).generate_state(2, np.uint64)
    prompts = _fingerprints(prompt_ids, prompt_mask, base[0])
    rows = _mixed(_fingerprints(ids, mask, base[1]) + np.repeat(prompts, group))
    places = np.cumsum(mask.numpy(), axis=1, dtype=np.uint64)
    words = _mixed(rows[:, None] + places * np.uint64(_WEYL[0]))
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _fingerprints(ids: Tensor, mask: Tensor, key: np.uint64) -> np.ndarray:
    """A word for the real tokens of each row, in their order."""
    real, places = mask.numpy(), np.cumsum(mask.numpy(), axis=1, dtype=np.uint64)
    words = _mixed(_mixed(ids.numpy().astype(np.uint64) + key) + places * np.uint64(_WEYL[1]))
    return _mixed(np.where(real, words, np.uint64(0)).sum(axis=1, dtype=np.uint64) + real.sum(axis=1, dtype=np.uint64))


def _mixed(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: a small change of a word changes all of it."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _philox(counter: list[np.ndarray], key: np.ndarray) -> list[np.ndarray]:
    """Ten rounds of Philox4x64 on arrays of counters `[rows, blocks]` under one key of two words."""
    c0, c1, c2, c3 = counter
    key0, key1 = int(key[0]), int(key[1])
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(key0), low1, high0 ^ c3 ^ np.uint64(key1), low0
        key0, key1 = (key0 + _WEYL[0]) % 2**64, (key1 + _WEYL[1]) % 2**64
    return [c0, c1, c2, c3]


def _multiply(words: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """High and low 64 bits of a 64 x 64 bit product, from four 32-bit products."""
    a0, a1 = words & _LOW, words >> _HALF
    b0, b1 = np.uint64(factor & 0xFFFFFFFF), np.uint64(factor >> 32)
    middle = a1 * b0 + ((a0 * b0) >> _HALF)
    carry = (middle & _LOW) + a0 * b1
    return a1 * b1 + (middle >> _HALF) + (carry >> _HALF), words * np.uint64(factor)
