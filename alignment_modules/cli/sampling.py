"""Prompts from anywhere, completed batch by batch and judged: rows to look at or to train on."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from alignment_modules.cli.loaded_policy import LoadedPolicy
from alignment_modules.rewards import RewardSet
from alignment_modules.rollouts.actor import judge
from alignment_modules.rollouts.codec import columns_of, real_tokens
from alignment_modules.rollouts.engines import InProcessEngine
from alignment_modules.rollouts.parameters import SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.seeds import Seeds
from datamodules import PromptDataModule
from datamodules.ranges import MAX_INT

Kind = Literal["scored", "pairs", "best"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Sampled:
    """A prompt with its completions.

    Attributes:
        index: The row's number in the source, which seeds its samples.
        row: The source's columns, and `prompt`, text or messages.
        completions: Texts.
        rewards: One each, None where no reward applies; None: they were not judged.
    """

    index: int
    row: dict[str, Any]
    completions: list[str]
    rewards: list[float | None] | None

    def plain(self) -> dict[str, Any]:
        """All there is, as one row."""
        many = {"completions": self.completions} if len(self.completions) > 1 else {"completion": self.completions[0]}
        judged = {} if self.rewards is None else {"rewards": self.rewards}
        return {"index": self.index, **self.row, **many, **judged}

    def training_row(self, kind: str) -> dict[str, Any] | None:
        """A row to train on.

        Args:
            kind: "scored": all completions with their rewards. "pairs": the first of the best against the first of the
                worst. "best": the first of the best.

        Returns:
            None where there is none: a completion that was not judged can be neither best nor worst, and of equal ones
            no pair can be made; scored rows need two that were judged.
        """
        judged = [
            (reward, text)
            for reward, text in zip(self.rewards or [], self.completions, strict=False)
            if reward is not None
        ]
        best, worst = (max(judged, key=_reward), min(judged, key=_reward)) if judged else ((0.0, ""), (0.0, ""))
        own: dict[str, Any]
        if kind == "best" and judged:
            own = {"completion": best[1]}
        elif kind == "pairs" and best[0] > worst[0]:
            own = {"chosen": best[1], "rejected": worst[1]}
        elif kind == "scored" and len(judged) > 1:
            own = {"completions": [text for _, text in judged], "rewards": [reward for reward, _ in judged]}
        else:
            return None
        return {"index": self.index, **self.row, **own}


class PromptSampler:
    """Completes a source's prompts in batches that do not depend on where it starts.

    Args:
        loaded: Who writes.
        source: A path, a hub id or rows; any format that has a prompt.
        parameters: How to draw.
        num_samples: Completions of a prompt.
        seed: Sample `g` of the row with index `i` is decided by `(seed, i, g)`.
        rewards: How completions are judged; None: not at all.
        batch_size: Prompts completed at once.
        as_chat: Whether plain prompts become messages.

    Raises:
        ValueError: If the source cannot be read, or lacks a column that a reward asks for.
    """

    def __init__(
        self,
        loaded: LoadedPolicy,
        source: str | Sequence[dict[str, Any]],
        parameters: SamplingParameters,
        *,
        num_samples: int = 1,
        seed: int = 0,
        rewards: RewardSet | None = None,
        batch_size: int = 8,
        as_chat: bool = False,
    ) -> None:
        self.loaded, self.parameters, self.num_samples, self.seed = loaded, parameters, num_samples, seed
        self.rewards, self.batch_size = rewards, batch_size
        self.engine = InProcessEngine(loaded.codec)
        self.engine.push(loaded.policy)
        data = PromptDataModule(
            predict=source, tokenizer=loaded.codec.tokenizer, as_chat=as_chat, max_length=MAX_INT, batch_size=batch_size
        )
        self.table: Any
        self.collate: Any
        self.table, self.collate = data.tables("predict")["predict"]
        if rewards is not None:
            rewards.check_columns(columns_of(self.collate([self.table[0]])).keys())

    def __len__(self) -> int:
        """Prompts."""
        return len(self.table)

    @property
    def fingerprint(self) -> str:
        """A checksum of the source's rows."""
        return str(self.table.fingerprint)

    def first_after(self, last: int | None) -> int:
        """Where `batches` starts so that no batch before it has a row whose index is greater than `last`."""
        done = 0 if last is None else int((self.table.index <= last).sum())
        return done if done == len(self.table) else done - done % self.batch_size

    def batches(self, start: int = 0) -> Iterator[list[Sampled]]:
        """All prompts in order.

        Args:
            start: Prompts to leave out, whole batches of them.

        Yields:
            A batch of completed prompts.

        Raises:
            RewardError: If a reward fails.
            NonFiniteLogits: If the policy's logits are not finite.
        """
        for first in range(start, len(self.table), self.batch_size):
            yield self._complete(range(first, min(first + self.batch_size, len(self.table))))

    def _complete(self, numbers: Sequence[int]) -> list[Sampled]:
        batch = self.collate(self.table[list(numbers)])
        device, samples = self.loaded.device, self.num_samples
        prompts = Prompts.from_padded(batch["prompts"].to(device), batch["prompt_attention_mask"].to(device))
        found = self.engine.generate(
            prompts, self.parameters, num_samples=samples, seeds=Seeds(batch["index"], self.seed)
        )
        written = real_tokens(found.ids, found.mask)
        rewards: list[float | None] | None = None
        if self.rewards is None:
            texts = self.loaded.codec.decode(written)
        else:
            table, texts = judge(self.rewards, self.loaded.codec, batch, written)
            rewards = [None if math.isnan(reward) else reward for reward in table.total.tolist()]
        columns = columns_of(batch)
        return [
            Sampled(
                index,
                self._tools(index) | {name: values[place] for name, values in columns.items()},
                texts[place * samples : (place + 1) * samples],
                None if rewards is None else rewards[place * samples : (place + 1) * samples],
            )
            for place, index in enumerate(batch["index"])
        ]

    def _tools(self, index: int) -> dict[str, Any]:
        """A row's tools: they are part of what its prompt looks like."""
        row = self.table.rows[index]
        return {name: row[name] for name in ("tools", "functions") if row.get(name)}


def _reward(entry: tuple[float, str]) -> float:
    return entry[0]
