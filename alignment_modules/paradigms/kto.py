"""Kahneman-Tversky optimization (arXiv:2402.01306): completions that are good or bad, each by itself."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignment_modules.functional import UnpairedLoss, mismatched, sequence_logps, unpaired_loss
from alignment_modules.functional.ranges import NonNegative, Positive, check_options
from alignment_modules.objective import Objective, Statistic
from alignment_modules.policies.context import position_limit
from alignment_modules.policies.frozen import frozen_companion, row_keys
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.scoring import score
from alignment_modules.policies.segments import Segments
from alignment_modules.training.pieces import cut_as
from alignment_modules.training.updates import UpdateModule

ROW = ("prompt_input_ids", "prompt_attention_mask", "completion_input_ids", "completion_attention_mask")


class KTOModule(UpdateModule):
    r"""Training on batches of prompt, completion and `label`: whether the completion is desirable.

    With the log-ratio `r = log pi(completion) - log ref(completion)`, a desirable completion's loss is
    `1 - sigmoid(beta (r - z))` and another's `1 - sigmoid(beta (z - r))`, averaged over the completions of the whole
    optimizer step. `z`, how far the policy is from the reference, is the mean log-ratio, but at least 0, of each prompt
    with the completion of the nearest row before it that has another prompt, rows standing in a circle in the order of
    the batch's `index`, else as they come. It is one for a step, over all its rows on all ranks and without gradient,
    so that no `micro_batch_size` changes it; in validation each batch has its own.

    A batch may hold `completion_loss_mask` `[batch, time]`: which of a completion's tokens the policy wrote.

    Args:
        reference: What the policy is held to: a folder, a `PolicyConfig` or a module. None: a frozen copy of the policy
            as it is now, or, for a LoRA policy, the policy with its adapter switched off.
        beta: Strength of the pull to the reference.
        loss: "kto", or "apo_zero_unpaired" (arXiv:2408.06266), which has no `z`.
        desirable_weight: Weight of desirable completions; times their number it should be 1 to 4/3 of the others'.
        undesirable_weight: Weight of the others.
        **common: Keywords of `UpdateModule` (micro_batch_size, max_grad_norm) and `AlignmentModule` (policy, optimizer,
            lr_scheduler, tokenizer, evaluation).

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
        return Segments.from_prompts(prompts, prompt_mask, completions, mask, batch.get("completion_loss_mask"))

    def before_updates(self, pieces: list[Any]) -> list[Any]:
        """Gives each piece the step's `kl`, the `z` of its loss."""
        kl = self.divergence(pieces) if self.loss == "kto" else None
        return pieces if kl is None else [piece | {"kl": kl} for piece in pieces]

    @torch.no_grad()
    def divergence(self, pieces: Sequence[Mapping[str, Any]]) -> Tensor:
        """`z` of some micro-batches, in training with those of all ranks; 0 where no pair is mismatched.

        Raises:
            ValueError: If that is so in training.
        """
        marked = [{"completion_loss_mask": piece[ROW[3]], **piece} for piece in pieces]
        rows, own = self.rows_of_step(marked)
        written = (rows[ROW[3]].bool() & rows["completion_loss_mask"].bool()).any(dim=1).tolist()
        keys = zip(row_keys((rows[ROW[0]], rows[ROW[1]])), written, strict=True)
        others = mismatched([key if some else None for key, some in keys], rows.get("index"))
        if self.training and any(written) and max(others) < 0:
            raise ValueError(
                f"loss='kto' needs completions of other prompts, but all {sum(written)} of this optimizer step have "
                "the same: use a larger batch_size, shuffled rows, drop_last, or loss='apo_zero_unpaired'"
            )
        other = torch.tensor(others, device=rows["label"].device)
        exists = rows[ROW[3]][other].bool() & (other >= 0)[:, None]
        if limit := position_limit(self.policy):
            exists &= exists.cumsum(dim=1) <= limit - rows[ROW[1]].sum(dim=1, keepdim=True)
        mine = (
            rows[ROW[0]],
            rows[ROW[1]],
            rows[ROW[2]][other],
            exists,
            exists & rows["completion_loss_mask"][other].bool(),
        )
        pairs = dict(zip((*ROW, "completion_loss_mask"), (column[own] for column in mine), strict=True))
        found = [self.logps(self.segments(piece)) for piece in cut_as(pairs, pieces)]
        ours, theirs, some = map(torch.cat, zip(*found, strict=True))
        sums = torch.stack([(ours - theirs).sum(), some.sum()])
        total, count = self.reduce(sums, "sum") if self.training else sums
        return (total / count.clamp(min=1)).clamp(min=0)

    def logps(self, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """Each completion's log-probability under policy and reference, and whether it has a token at all, [batch]."""
        with self.reference.reading() as reference:
            reference_logps = sequence_logps(score(reference, segments).token_logps)
        scores = score(self.policy, segments)
        return sequence_logps(scores.token_logps), reference_logps, scores.mask.any(dim=1)

    def objective(self, batch: dict[str, Any]) -> Objective:
        """The loss summed over completions; one without a token is none."""
        kl = batch.get("kl")
        if kl is None and self.loss == "kto":
            kl = self.divergence([batch])
        logps, reference_logps, counted = self.logps(batch.get("segments") or self.segments(batch))
        desirable = batch["label"].bool()
        losses = unpaired_loss(logps, reference_logps, desirable, kl, loss=self.loss, beta=self.beta, **self.weights)
        total, weight = (losses * counted).sum(), counted.sum()
        statistics = {"loss": Statistic(total, weight)} | ({} if kl is None else {"kl": Statistic(kl * weight, weight)})
        for name, rows in (("chosen", desirable & counted), ("rejected", ~desirable & counted)):
            rewards = self.beta * (logps.detach() - reference_logps)
            statistics[f"rewards/{name}"] = Statistic((rewards * rows).sum(), rows.sum())
            statistics[f"logps/{name}"] = Statistic((logps.detach() * rows).sum(), rows.sum())
        return Objective.of(total, weight, statistics)

    def publish(
        self, values: Mapping[str, float], stage: Literal["train", "val", "test"], step: int | None = None
    ) -> None:
        """Adds the margin: the difference of two means, each over rows of its own."""
        sides = ((name, name.replace("chosen", "rejected")) for name in values if name.startswith("rewards/chosen"))
        margins = {one.replace("chosen", "margins"): values[one] - values[two] for one, two in sides if two in values}
        super().publish({**values, **margins}, stage, step)

    def describe(self) -> dict[str, str]:
        """Adds the loss and its normaliser."""
        weights = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.weights.items())
        return super().describe() | {
            "loss": f"{self.loss}, beta {self.beta}, {weights}",
            "normaliser": "completions of the optimizer step, over all micro-batches and ranks",
        }
