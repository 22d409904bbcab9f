"""What every paradigm on preference pairs does: lay out, score, count, sum and log them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.functional import sequence_logps
from alignment_modules.functional.statistics import RowSums, Statistic
from alignment_modules.policies.frozen import row_keys
from alignment_modules.policies.layout import Reads
from alignment_modules.policies.scoring import Ask, Scores, score
from alignment_modules.policies.segments import Segments
from alignment_modules.training.objective import Objective

PAIR_KEYS = tuple(
    f"{side}_{part}" for side in ("prompt", "chosen", "rejected") for part in ("input_ids", "attention_mask")
)
"""What every batch of preference pairs holds, `[pairs, time]` each."""


COLUMNS = {
    "label": "the probability that the chosen completion is the better one; DPOModule takes it",
    "margin": "by how much the chosen completion is the better one; DPOModule and RewardModule take it",
}
"""What a batch of preference pairs may hold besides, `[pairs]` each, of which every paradigm says what it takes."""


def pair_segments(
    batch: Mapping[str, Any], *, takes: Collection[str] = (), score_prompts: bool = False, reads: Reads = "targets"
) -> Segments:
    """Each prompt with its two completions, which share it.

    Args:
        batch: With `PAIR_KEYS`, and maybe `chosen_loss_mask` and `rejected_loss_mask` `[pairs, time]`: which tokens of
            a completion the policy wrote. The others are context alone.
        takes: Which of `COLUMNS` have a meaning for the paradigm.
        score_prompts: As in `Segments.from_pairs`.
        reads: Likewise.

    Raises:
        ValueError: If the batch holds another of these columns, which would change nothing.
    """
    for name, meaning in COLUMNS.items():
        if name in batch and name not in takes:
            raise ValueError(
                f"a batch of preference pairs holds `{name}`, {meaning}; this paradigm has no use for it. Rename the "
                f"column where it is another (data.columns={{'{name}': 'my_{name}'}}), or leave it out"
            )
    loss_masks = (batch.get(f"{side}_loss_mask") for side in ("chosen", "rejected"))
    keys = (batch[key] for key in PAIR_KEYS)
    return Segments.from_pairs(*keys, *loss_masks, score_prompts=score_prompts, reads=reads)


def pair_keys(batch: Mapping[str, Any]) -> list[bytes]:
    """One key a pair, made of its tokens and of those not scored."""
    columns = []
    for name in ("prompt", "chosen", "rejected"):
        mask = batch[f"{name}_attention_mask"].bool()
        loss_mask = batch.get(f"{name}_loss_mask")
        scored = mask if loss_mask is None else mask & loss_mask.bool()
        columns += [(batch[f"{name}_input_ids"], mask), (scored, mask)]
    return row_keys(*columns)


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """Pairs under a policy. A pair without a scored token in either completion compares nothing and is not counted.

    Attributes:
        scores: Of the completions, rows alternating chosen and rejected, `[2 * pairs, time]`.
        prompts: Of the prompts, `[pairs, time]`; None where they are not scored.
        logps: `[pairs, 2]`, log-probabilities of the chosen and the rejected completion, summed over tokens, float64.
        lengths: `[pairs, 2]`, their scored tokens.
        counted: `[pairs]` bool.
    """

    scores: Scores
    prompts: Scores | None
    logps: Tensor
    lengths: Tensor
    counted: Tensor

    @classmethod
    def of(cls, scores: Scores, prompts: Scores | None = None) -> ScoredPairs:
        """Pairs of what is scored.

        Args:
            scores: `[2 * pairs, time]`, rows alternating chosen and rejected.
            prompts: `[pairs, time]`, where they are scored.
        """
        lengths = scores.mask.sum(dim=1).view(-1, 2)
        logps = sequence_logps(scores.token_logps).view(-1, 2)
        return cls(scores, prompts, logps, lengths, lengths.amin(dim=1) > 0)

    @property
    def mean_logps(self) -> Tensor:
        """`[pairs, 2]`, means over tokens."""
        return self.logps / self.lengths.clamp(min=1)

    def objective(
        self, losses: Tensor, rewards: Tensor, more: Mapping[str, Tensor] | None = None, *, logits: bool = False
    ) -> Objective:
        """The losses summed over the counted pairs, with what every paradigm on pairs logs.

        Args:
            losses: `[pairs]`.
            rewards: `[pairs, 2]`, what the paradigm implicitly takes for the completions' rewards.
            more: More to log, `[pairs]` each.
            logits: Whether the mean logits of the completions' tokens are logged, where they were asked for.
        """
        counted = self.counted
        values = {"logps/chosen": self.logps[:, 0], "logps/rejected": self.logps[:, 1], **(more or {})}
        statistics = {name: RowSums(value * counted, counted).mean for name, value in values.items()}
        statistics |= _token_statistics(self.scores, logits)
        return Objective.of_rows(losses * counted, counted, statistics, pair_rows(rewards, counted))


def score_pairs(
    policy: nn.Module, segments: Segments, *, ask: Collection[Ask] = (), score_prompts: bool = False
) -> ScoredPairs:
    """Scores the pairs of `pair_segments`.

    Args:
        policy: As in `score`.
        segments: Of the pairs.
        ask: As in `score`.
        score_prompts: Whether the segments were made so.
    """
    scores, prompts = score(policy, segments, ask=ask), None
    if score_prompts:
        scores, prompts = _split(scores, len(scores.mask) // 3 * 2)
    return ScoredPairs.of(scores, prompts)


def best_and_worst(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Which two completions of each prompt make a pair.

    Args:
        rewards: `[prompts, G]`; NaN: not judged.

    Returns:
        `[prompts, 2]` int64, the places of the best and the worst completion (of equal ones the first), and `[prompts]`
        bool, whether they differ: by 1e-6 or more, with at least two judged.

    >>> best_and_worst(torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, torch.nan]]))
    (tensor([[1, 0],
            [0, 0]]), tensor([ True, False]))
    """
    unjudged = rewards.isnan()
    best, worst = rewards.masked_fill(unjudged, -torch.inf), rewards.masked_fill(unjudged, torch.inf)
    differ = best.amax(dim=1) - worst.amin(dim=1) >= 1e-6
    return torch.stack([best.argmax(dim=1), worst.argmin(dim=1)], dim=1), differ


def pair_rows(rewards: Tensor, counted: Tensor) -> dict[str, RowSums]:
    """What is told of rewards, of each of the counted pairs.

    Args:
        rewards: `[pairs, 2]` of the chosen and the rejected completion.
        counted: `[pairs]` bool.
    """
    rewards = rewards.detach()
    values = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": rewards[:, 0] - rewards[:, 1],
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).to(rewards),
    }
    return {name: RowSums(value * counted, counted) for name, value in values.items()}


def row_means(values: Tensor, mask: Tensor) -> Tensor:
    """Means over the tokens of each row, 0 where there is none: `[rows, time]` to `[rows]`."""
    return sequence_logps(values * mask) / mask.sum(dim=1).clamp(min=1)


def _split(scores: Scores, rows: int) -> tuple[Scores, Scores]:
    parts: list[dict[str, Any]] = [{}, {}]
    for name, value in vars(scores).items():
        halves = (None, None) if value is None else (value[:rows], value[rows:])
        for part, half in zip(parts, halves, strict=True):
            part[name] = half
    return Scores(**parts[0]), Scores(**parts[1])


def _token_statistics(scores: Scores, logits: bool) -> dict[str, Statistic]:
    """Of tokens: of the chosen completions how many are the likeliest, of all the entropy and the mean logit."""
    found: dict[str, Statistic] = {}
    if scores.correct is not None:
        chosen, mask = scores.correct[0::2], scores.mask[0::2]
        found["mean_token_accuracy"] = Statistic((chosen & mask).sum(), mask.sum())
    if scores.entropy is not None:
        found["entropy"] = Statistic(scores.entropy.detach().sum(), scores.mask.sum())
    if logits and scores.mean_logp is not None and scores.normalizer is not None:
        mean_logits = (scores.mean_logp + scores.normalizer).detach()
        for start, name in enumerate(("chosen", "rejected")):
            found[f"logits/{name}"] = Statistic(mean_logits[start::2].sum(), scores.mask[start::2].sum())
    return found
