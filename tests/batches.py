"""Batches of every kind of paradigm, of rows with numbers: the same row is the same in whatever batch it stands."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = dict[str, Any]
LENGTHS = (5, 9, 3, 12, 7, 4, 10, 6)


def tokens(row: int, salt: int, length: int) -> Tensor:
    """A row's tokens: the same in every batch that holds it."""
    return torch.randint(1, 39, (length,), generator=torch.Generator().manual_seed(1000 * salt + row))


def padded(rows: Sequence[Tensor], extra: int, side: str, value: int = 0) -> Tensor:
    """Rows beside each other, [rows, longest + extra]."""
    width = max(map(len, rows)) + extra
    gaps = [(0, width - len(row)) if side == "right" else (width - len(row), 0) for row in rows]
    return torch.stack([F.pad(row, gap, value=value) for row, gap in zip(rows, gaps, strict=True)])


def masked(name: str, rows: Sequence[Tensor], extra: int, side: str) -> Batch:
    """Ids and attention mask of rows, under a name; padding holds a token like any other."""
    return {
        f"{name}input_ids": padded(rows, extra, side, value=39),
        f"{name}attention_mask": padded([torch.ones_like(row) for row in rows], extra, side),
    }


def supervised(rows: Sequence[int], extra: int = 0, side: str = "right") -> Batch:
    """Rows whose first two tokens are not supervised."""
    ids = [tokens(row, 0, LENGTHS[row]) for row in rows]
    labels = [torch.cat([torch.full((2,), -100), row[2:]]) for row in ids]
    return masked("", ids, extra, side) | {"labels": padded(labels, extra, side, value=-100), "index": list(rows)}


def weighted(rows: Sequence[int], extra: int = 0, side: str = "right") -> Batch:
    """The same with a weight on each token: 0 on some supervised ones, and none that could be used where none is."""
    weights = [torch.rand(LENGTHS[row], generator=torch.Generator().manual_seed(row)).mul(3) for row in rows]
    for row, own in zip(rows, weights, strict=True):
        own[:2], own[3 + row % 2 :: 4] = torch.nan, 0.0
    return supervised(rows, extra, side) | {"loss_weights": padded(weights, extra, side, value=-1)}


def pairs(rows: Sequence[int], extra: int = 0, side: str = "right") -> Batch:
    """Prompts of one to three tokens with two completions."""
    batch = masked("prompt_", [tokens(row, 1, 1 + row % 3) for row in rows], extra, side)
    batch |= masked("chosen_", [tokens(row, 2, LENGTHS[row] - 2) for row in rows], extra, side)
    return batch | masked("rejected_", [tokens(row, 3, LENGTHS[(row + 3) % 8] - 1) for row in rows], extra, side)


def unpaired(rows: Sequence[int], extra: int = 0, side: str = "right") -> Batch:
    """Prompts with one completion, good or bad."""
    batch = masked("prompt_", [tokens(row, 1, 1 + row % 3) for row in rows], extra, side)
    batch |= masked("completion_", [tokens(row, 2, LENGTHS[row] - 2) for row in rows], extra, side)
    return batch | {"label": torch.tensor([row % 3 != 1 for row in rows]), "index": list(rows)}


def judged_pairs(rows: Sequence[int], extra: int = 0, side: str = "right") -> Batch:
    """Pairs with a margin each."""
    return pairs(rows, extra, side) | {"margin": torch.tensor([0.1 * row for row in rows])}


def rollouts(rows: Sequence[int], extra: int = 0, side: str = "right", group: int = 4) -> Batch:
    """Prompts with a group of given completions, rewards and old log-probabilities each."""
    prompts = masked("", [tokens(row, 1, 1 + row % 3) for row in rows], extra, side)
    numbers = [group * row + member for row in rows for member in range(group)]
    lengths = [1 + (5 * number + 3) % 8 for number in numbers]
    drawn = [torch.Generator().manual_seed(number) for number in numbers]
    old = [-3.5 + torch.rand(length, generator=g) for length, g in zip(lengths, drawn, strict=True)]
    return {
        "prompts": prompts["input_ids"],
        "prompt_attention_mask": prompts["attention_mask"],
        "responses": padded(
            [tokens(n, 4, length) for n, length in zip(numbers, lengths, strict=True)], extra, "right", 39
        ),
        "response_mask": padded([torch.ones(length).bool() for length in lengths], extra, "right"),
        "rewards": torch.tensor([float(number % 3 == 0) + 0.5 * (number % group == 0) for number in numbers]),
        "old_logprobs": padded(old, extra, "right"),
        "greedy_rewards": torch.tensor([0.25 * (row % 4) for row in rows]),
    }


def rollouts_of_two_rewards(rows: Sequence[int], extra: int = 0, side: str = "right", group: int = 4) -> Batch:
    """The same with each of two rewards by itself; the second does not apply to all."""
    batch = rollouts(rows, extra, side, group)
    numbers = torch.tensor([group * row + member for row in rows for member in range(group)])
    second = (numbers * 7 % 5).float().masked_fill(numbers % 6 == 5, torch.nan)
    return batch | {"rewards": torch.stack([batch["rewards"], second], dim=1)}


def entry(key: str, value: Any, *more: str, group: int = 1) -> Callable[[Batch, int], None]:
    """Sets all that a row has under some keys."""

    def change(batch: Batch, row: int) -> None:
        for name in (key, *more):
            if name not in batch:
                batch[name] = batch[name.replace("loss_mask", "attention_mask")].clone()
            batch[name][group * row : group * (row + 1)] = value

    return change


def never_called(completions: list[str]) -> list[float]:
    """A reward for batches that bring their own."""
    raise AssertionError("the batch brings its own rewards")


class Digits:
    """A tokenizer of ids: enough to decode."""

    eos_token_id, pad_token_id = 7, 0

    def __len__(self) -> int:
        return 40

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """Ids in words."""
        return [" ".join(map(str, row)) for row in rows]


def threes(completions: Sequence[str]) -> list[float]:
    """A reward that a policy can learn."""
    return [float(text.count("3")) for text in completions]


def prompts(count: int = 4) -> Batch:
    """Prompts to be completed."""
    ids = torch.randint(1, 40, (count, 3), generator=torch.Generator().manual_seed(count))
    return {"prompts": ids, "prompt_attention_mask": torch.ones_like(ids), "index": list(range(count))}
