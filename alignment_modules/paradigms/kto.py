"""Kahneman-Tversky optimization (arXiv:2402.01306): completions that are good or bad, each by itself."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.functional import UnpairedLoss, mismatched_completions, sequence_logps, unpaired_loss
from alignment_modules.functional.ranges import NonNegative, Positive, check_options
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.context import position_limit
from alignment_modules.policies.frozen import frozen_companion
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.scoring import score
from alignment_modules.policies.segments import Segments
from alignment_modules.training.objective import Objective
from alignment_modules.training.pieces import cut_as
from alignment_modules.training.updates import UpdateModule

ROW = ("prompt_input_ids", "prompt_attention_mask", "completion_input_ids", "completion_attention_mask")
TARGETS = "completion_loss_mask"


class KTOModule(UpdateModule):
    r"""Training on batches of prompt, completion and `label`: whether the completion is desirable.

    With the log-ratio `r = log pi(completion) - log ref(completion)`, a desirable completion's loss is
    `1 - sigmoid(beta (r - z))` and another's `1 - sigmoid(beta (z - r))`, averaged over the completions of the whole
    optimizer step. `z`, how far the policy is from the reference, is the mean log-ratio, but at least 0, of each prompt
    with the completion of the nearest row before it that has another prompt, rows standing in a circle in the order of
    the batch's `index`, else as they come. It is one for a step, over all rows on all ranks and without gradient; in
    validation each batch has its own. `completion_loss_mask` `[batch, time]`, if given, marks the policy's own tokens.

    Args:
        reference: What the policy is held to: a folder, a `PolicyConfig` or a module. None: a frozen copy of the policy
            as it is now, or, for a LoRA policy, the policy with its adapter switched off.
        beta: Strength of the pull to the reference.
        loss: "kto", or "apo_zero_unpaired" (arXiv:2408.06266), which has no `z`.
        desirable_weight: Weight of desirable completions; times their number it should be 1 to 4/3 of the others'.
        undesirable_weight: Weight of the others.
        **common: Keywords of `UpdateModule` (micro_batch_size, max_grad_norm) and those of `AlignmentModule`.

    Raises:
        ValueError: If an option has a value that is not allowed.
    """

    paradigm = "kto"
    batch_keys = (*ROW, "label")
    compares_log_probs = True
    bar = ("loss", "rewards/margins", "kl")

    def __init__(
        self,
        *,
        reference: str | PolicyConfig | nn.Module | None = None,
        beta: Positive = 0.1,
        loss: UnpairedLoss = "kto",
        desirable_weight: NonNegative = 1.0,
        undesirable_weight: NonNegative = 1.0,
        **common: Any,
    ) -> None:
        check_options(KTOModule.__init__, locals())
        super().__init__(**common)
        self.beta, self.loss = beta, loss
        self.weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        self.reference = frozen_companion(reference, self.policy)

    def segments(self, batch: Mapping[str, Any]) -> Segments:
        """Each prompt with its completion."""
        prompts, prompt_mask, completions, mask = (batch[key] for key in ROW)
        return Segments.from_prompts(prompts, prompt_mask, completions, mask, batch.get(TARGETS))

    @torch.no_grad()
    def before_updates(self, pieces: list[Any]) -> list[Any]:
        """Gives each piece the step's `kl`, the `z` of its loss; outside training, that of these pieces alone.

        Raises:
            ValueError: If all rows of a training step have the same prompt.
        """
        if self.loss != "kto":
            return pieces
        rows, own = self.rows_of_step([{TARGETS: piece[ROW[3]], **piece} for piece in pieces])
        sides, limit = [rows[key] for key in (*ROW, TARGETS)], position_limit(self.policy)
        others = mismatched_completions(*sides, index=rows.get("index"), limit=limit)
        if self.training and sides[-1].any() and not others[-1].any():
            raise ValueError(
                f"loss='kto' needs completions of other prompts, but all {len(sides[0])} rows of this optimizer step "
                "have the same: use a larger batch_size, shuffled rows, drop_last, or loss='apo_zero_unpaired'"
            )
        pairs = {key: side[own] for key, side in zip((*ROW, TARGETS), (*sides[:2], *others), strict=True)}
        found = [self.logps(self.segments(piece)) for piece in cut_as(pairs, pieces)]
        ours, theirs, some = map(torch.cat, zip(*found, strict=True))
        sums = torch.stack([(ours - theirs).sum(), some.sum()])
        total, count = self.reduce(sums, "sum") if self.training else sums
        kl = (total / count.clamp(min=1)).clamp(min=0)
        return [{**piece, "kl": kl} for piece in pieces]

    def logps(self, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """Each completion's log-probability under policy and reference, and whether it has a token at all, [batch]."""
        with self.reference.reading() as reference:
            reference_logps = sequence_logps(score(reference, segments).token_logps)
        scores = score(self.policy, segments)
        return sequence_logps(scores.token_logps), reference_logps, scores.mask.any(dim=1)

    def objective(self, batch: dict[str, Any]) -> Objective:
        """The loss summed over completions; one without a token is none."""
        kl = (batch if "kl" in batch else self.before_updates([batch])[0]).get("kl")
        logps, reference_logps, counted = self.logps(batch.get("segments") or self.segments(batch))
        desirable = batch["label"].bool()
        losses = unpaired_loss(logps, reference_logps, desirable, kl, loss=self.loss, beta=self.beta, **self.weights)
        weight = counted.sum()
        statistics = {} if kl is None else {"kl": Statistic(kl * weight, weight)}
        kinds = torch.stack([desirable & counted, ~desirable & counted])
        rewards = (self.beta * (logps.detach() - reference_logps) * kinds).sum(dim=1)
        sums, counts = (logps.detach() * kinds).sum(dim=1), kinds.sum(dim=1)
        statistics["rewards/margins"] = Statistic(rewards, counts, "difference")
        for side, name in enumerate(("chosen", "rejected")):
            statistics[f"rewards/{name}"] = Statistic(rewards[side], counts[side])
            statistics[f"logps/{name}"] = Statistic(sums[side], counts[side])
        return Objective.of_rows(losses * counted, counted, statistics)

    def describe(self) -> dict[str, str]:
        """Adds the loss and its normaliser."""
        good, bad = self.weights.values()
        return super().describe() | {
            "loss": f"{self.loss}, beta {self.beta}, weight of desirable completions {good}, of the others {bad}",
            "normaliser": "completions of the optimizer step, over all micro-batches and ranks",
        }
