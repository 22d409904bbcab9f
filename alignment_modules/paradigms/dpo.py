"""Direct preference optimization (arXiv:2305.18290) and the losses of its family, against a frozen reference."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from alignment_modules.functional import BATCH_COUPLED_LOSSES, Preference, sequence_logps
from alignment_modules.functional.ranges import NonNegative, Positive, Range, Share, check_options
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.frozen import frozen_companion, row_keys
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.scoring import Scores, score
from alignment_modules.policies.segments import Segments
from alignment_modules.training.objective import Objective
from alignment_modules.training.pieces import PAIR_KEYS, cut_as
from alignment_modules.training.updates import UpdateModule


class DPOModule(UpdateModule):
    r"""Direct preference optimization on batches of prompt, chosen and rejected completion.

    With `h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))`, the default loss is
    `-log sigmoid(beta * h)`, averaged over the pairs of the whole optimizer step. Prompts are computed once a pair.

    "aot" and "aot_unpaired" sort the pairs of an optimizer step. They are scored once without gradients, over all
    micro-batches and ranks, and each pair is given the values that stand at its own places in the other order: its
    micro-batch then has its part of the whole's gradient, exactly. Such a module takes its optimizer steps itself, one
    a batch (`micro_batch_size` and `max_grad_norm` here, in place of the Trainer's accumulation and clipping); with all
    other losses the Trainer does. Validation sorts within each batch.

    A batch may hold `chosen_loss_mask` and `rejected_loss_mask` `[batch, time]`: which of a completion's tokens the
    policy wrote. The others, such as a user's turns in between, are context alone and count in no sum, length or mean.

    Args:
        reference: What the policy is held to: a folder, a `PolicyConfig` or a module. None: a frozen copy of the policy
            as it is now, or, for a LoRA policy, the policy with its adapter switched off.
        beta: Strength of the pull to the reference (`tau` for "ipo").
        loss: "sigmoid" (with `label_smoothing`: conservative DPO), "robust", "ipo", "hinge", "exo_pair", "nca_pair",
            "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired", "discopop", "sigmoid_norm", "sft"
            (each chosen completion's mean over its tokens, then the mean over pairs; `SFTModule` has one over tokens).
        label_smoothing: Share of pairs assumed to be labelled the wrong way round, in [0, 0.5).
        nll_coef: Weight of the chosen completion's mean negative log-likelihood, added to each pair's loss (RPO).
        cache_reference: Keep the reference's log-probabilities of every pair seen, by the pair's tokens, so that only
            the first epoch computes them. Forgotten as soon as the reference's weights change.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha" (arXiv:2309.16240): what takes the log-ratio's place.
        alpha: Coefficient of the alpha-divergence, in [0, 1]: 1 is the reverse KL, 0 the forward KL.
        discopop_tau: Temperature of "discopop".
        **common: Keywords of `AlignmentModule` (policy, optimizer, lr_scheduler, tokenizer, evaluation) and, for
            "aot" and "aot_unpaired", of `UpdateModule` (micro_batch_size, max_grad_norm).

    Raises:
        ValueError: If an option has a value that is not allowed, or options contradict each other.
    """

    paradigm = "dpo"
    batch_keys = PAIR_KEYS
    compares_log_probs = True
    bar = ("loss", "rewards/accuracies", "rewards/margins")

    def __init__(
        self,
        *,
        reference: str | PolicyConfig | nn.Module | None = None,
        beta: Positive = 0.1,
        loss: str = "sigmoid",
        label_smoothing: Annotated[float, Range(0, 0.5, "[)")] = 0.0,
        nll_coef: NonNegative = 0.0,
        cache_reference: bool = False,
        f_divergence: str = "reverse_kl",
        alpha: Share = 0.5,
        discopop_tau: Positive = 0.05,
        **common: Any,
    ) -> None:
        check_options(DPOModule.__init__, locals())
        preference = Preference(loss, beta, label_smoothing, f_divergence, alpha, discopop_tau)
        super().__init__(**common)
        self.sorts = loss in BATCH_COUPLED_LOSSES
        self.automatic_optimization = not self.sorts
        self.preference, self.beta, self.nll_coef = preference, beta, nll_coef
        self.reference = frozen_companion(reference, self.policy)
        self.cache_reference = cache_reference

    def segments(self, batch: Mapping[str, Any]) -> Segments:
        """Each prompt with its two completions."""
        loss_masks = (batch.get(f"{side}_loss_mask") for side in ("chosen", "rejected"))
        return Segments.from_pairs(*(batch[key] for key in self.batch_keys), *loss_masks)

    def before_updates(self, pieces: list[Any]) -> list[Any]:
        """For losses that sort: gives each pair its partners among all pairs of the step."""
        if not self.sorts or (len(pieces) == 1 and self.trainer.world_size == 1):
            return pieces
        found = []
        for piece in pieces:
            segments = piece.get("segments") or self.segments(piece)
            scores = score(self.policy, segments)
            logps = [sequence_logps(scores.token_logps).view(-1, 2), self.reference_logps(piece, segments)]
            found.append({"logps": torch.cat(logps, dim=1), "counted": scores.mask.any(dim=1).view(-1, 2).all(dim=1)})
        rows, own = self.rows_of_step(found)
        logps, counted = rows["logps"], rows["counted"]
        partners = torch.zeros_like(logps[:, :2])
        partners[counted] = self.preference.partners(*logps[counted].unbind(1))
        known = {"reference_logps": logps[own, 2:], "partners": partners[own]}
        return [piece | part for piece, part in zip(pieces, cut_as(known, pieces), strict=True)]

    def objective(self, batch: dict[str, Any]) -> Objective:
        """The preference loss summed over pairs."""
        segments = batch.get("segments") or self.segments(batch)
        details = not self.training or self.logging_due
        scores = score(self.policy, segments, ask=["entropy", "accuracy"] if details else [])
        logps = sequence_logps(scores.token_logps).view(-1, 2)
        lengths = scores.mask.sum(dim=1).view(-1, 2)
        partners, reference_logps = batch.get("partners"), batch.get("reference_logps")
        if reference_logps is None:
            reference_logps = self.reference_logps(batch, segments)
        # A pair without a scored token in either completion compares nothing.
        counted = lengths.amin(dim=1) > 0
        if self.sorts:  # nor may it take part in the others' order
            partners = None if partners is None else partners[counted]
            logps, lengths, reference_logps = logps[counted], lengths[counted], reference_logps[counted]
            counted = counted[counted]
        losses = self.preference(
            *logps.unbind(1),
            *reference_logps.unbind(1),
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1],
            partners=partners,
        )
        if self.nll_coef:
            losses = losses - self.nll_coef * logps[:, 0] / lengths[:, 0].clamp(min=1)
        total = (losses * counted).sum()
        statistics = self.statistics(total, counted, logps.detach(), reference_logps)
        statistics |= _token_statistics(scores)
        return Objective.of(total, counted.sum(), statistics)

    def reference_logps(self, batch: dict[str, Any], segments: Segments) -> Tensor:
        """Summed log-probabilities under the reference, [pairs, 2]."""

        def compute() -> Tensor:
            with self.reference.reading() as reference:
                return sequence_logps(score(reference, segments).token_logps).view(-1, 2)

        return self.reference.cached(_pair_keys(batch), compute) if self.cache_reference else compute()

    def statistics(
        self, total: Tensor, counted: Tensor, logps: Tensor, reference_logps: Tensor
    ) -> dict[str, Statistic]:
        """Rewards `beta * (log pi - log ref)`, their margins and accuracies, and the policy's log-probabilities."""
        rewards = self.beta * (logps - reference_logps)
        values = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": rewards[:, 0] - rewards[:, 1],
            "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).float(),
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }
        weight = counted.sum()
        return {"loss": Statistic(total, weight)} | {
            name: Statistic((value * counted).sum(), weight) for name, value in values.items()
        }

    def describe(self) -> dict[str, str]:
        """Adds the loss, its normaliser and what the reference is."""
        options = self.preference
        return super().describe() | {
            "loss": f"{options.loss}, beta {options.beta}, label smoothing {options.label_smoothing}, "
            f"nll_coef {self.nll_coef}"
            + f", divergence {options.f_divergence}" * (options.f_divergence != "reverse_kl")
            + "; sorts the pairs of the optimizer step, over all micro-batches and ranks" * self.sorts,
            "normaliser": "pairs of the optimizer step, over all micro-batches and ranks",
            "reference": f"{self.reference.describe()}{', log-probabilities cached' * self.cache_reference}",
        }


def _token_statistics(scores: Scores) -> dict[str, Statistic]:
    if scores.correct is None or scores.entropy is None:
        return {}
    chosen, mask = scores.correct[0::2], scores.mask[0::2]
    return {
        "mean_token_accuracy": Statistic((chosen & mask).sum(), mask.sum()),
        "entropy": Statistic(scores.entropy.detach().sum(), scores.mask.sum()),
    }


def _pair_keys(batch: dict[str, Any]) -> list[bytes]:
    """One key a pair, made of its tokens and of those not scored."""
    columns = []
    for name in ("prompt", "chosen", "rejected"):
        mask = batch[f"{name}_attention_mask"].bool()
        loss_mask = batch.get(f"{name}_loss_mask")
        scored = mask if loss_mask is None else mask & loss_mask.bool()
        columns += [(batch[f"{name}_input_ids"], mask), (scored, mask)]
    return row_keys(*columns)
