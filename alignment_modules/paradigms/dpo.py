"""Direct preference optimization (arXiv:2305.18290) and the losses of its family, against a frozen reference."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from alignment_modules.functional import Preference, length_desensitized_logps, sequence_logps
from alignment_modules.functional.ranges import NonNegative, Positive, Range, Share, check_options
from alignment_modules.policies.frozen import frozen_companion
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.scoring import Ask, Scores, score
from alignment_modules.policies.segments import Segments
from alignment_modules.training.objective import Objective
from alignment_modules.training.pairs import (
    COLUMNS,
    PAIR_KEYS,
    ScoredPairs,
    pair_keys,
    pair_segments,
    row_means,
    score_pairs,
)
from alignment_modules.training.pieces import cut_as
from alignment_modules.training.reference_sync import ReferenceSync, SyncReference
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
    It may hold `label` `[batch]`, the probability that the chosen completion is the better one (the loss is then the
    expected one), or `margin` `[batch]`, what `beta * h` has to exceed (ODPO, arXiv:2402.10571).

    Args:
        reference: What the policy is held to: a folder, a `PolicyConfig` or a module. None: a frozen copy of the policy
            as it is now, or, for a LoRA policy, the policy with its adapter switched off.
        beta: Strength of the pull to the reference (`tau` for "ipo").
        loss: "sigmoid" (with `label_smoothing`: conservative DPO), "robust", "ipo", "hinge", "exo_pair", "nca_pair",
            "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired", "discopop", "sigmoid_norm", "sft"
            (each chosen completion's mean over its tokens, then the mean over pairs; `SFTModule` has one over tokens).
            A list of them: their weighted sum, on one forward pass (MPO, arXiv:2411.10442, has sigmoid, bco_pair, sft).
        loss_weights: A weight for each loss of a list; None: 1 each (MPO's paper: 0.8, 0.2, 1).
        label_smoothing: Share of pairs assumed to be labelled the wrong way round, in [0, 0.5).
        nll_coef: Weight of the chosen completion's mean negative log-likelihood, added to each pair's loss (RPO).
        cache_reference: Keep the reference's log-probabilities of every pair seen, by the pair's tokens, so that only
            the first epoch computes them. Forgotten as soon as the reference's weights change.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha" (arXiv:2309.16240): what takes the log-ratio's place.
        alpha: Coefficient of the alpha-divergence, in [0, 1]: 1 is the reverse KL, 0 the forward KL.
        discopop_tau: Temperature of "discopop".
        ld_alpha: Weight of the tokens beyond the length that both completions of a pair have (LD-DPO,
            arXiv:2409.06411), in [0, 1]; 1: all count alike. For losses of sums.
        wpo: Whether a pair's loss is weighted by how likely the policy is to write it (WPO, arXiv:2406.11827): the
            product over both sides of `exp(mean(log p - log sum p^2))` over tokens, without gradient. The product is
            not cut off at 1. `nll_coef` is not weighted.
        dpop_coef: Weight of DPO-Positive's penalty for a chosen completion that is less likely than under the reference
            (arXiv:2402.13228, which uses 50): `h` becomes `h - dpop_coef * max(0, log ref - log pi)`.
        ipo_logps: Whether "ipo" compares the "mean" (as its authors' corrected code does) or the "sum" over tokens.
        sync_reference: Moves the reference towards the policy in steps (TR-DPO, arXiv:2404.09656), with `alpha` and
            `every_n_steps`; it is then a copy of its own, with an adapter merged in, and saved in checkpoints.
        log_logits: Whether `logits/chosen` and `logits/rejected`, means over the vocabulary and tokens, are logged.
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
        loss: str | list[str] = "sigmoid",
        loss_weights: list[float] | None = None,
        label_smoothing: Annotated[float, Range(0, 0.5, "[)")] = 0.0,
        nll_coef: NonNegative = 0.0,
        cache_reference: bool = False,
        f_divergence: str = "reverse_kl",
        alpha: Share = 0.5,
        discopop_tau: Positive = 0.05,
        ld_alpha: Share = 1.0,
        wpo: bool = False,
        dpop_coef: NonNegative = 0.0,
        ipo_logps: Literal["mean", "sum"] = "mean",
        sync_reference: SyncReference | None = None,
        log_logits: bool = False,
        **common: Any,
    ) -> None:
        check_options(DPOModule.__init__, locals())
        preference = Preference(
            loss, beta, label_smoothing, f_divergence, alpha, discopop_tau, loss_weights, dpop_coef, ipo_logps
        )
        sync = SyncReference.of(sync_reference)
        _check_together(preference, ld_alpha, wpo, cache_reference, sync)
        super().__init__(**common)
        self.sorts = preference.sorts
        self.automatic_optimization = not self.sorts
        self.preference, self.beta, self.nll_coef = preference, beta, nll_coef
        self.reference = frozen_companion(reference, self.policy, saved=sync is not None)
        self.sync = None if sync is None else ReferenceSync(self.reference, sync)
        self.cache_reference, self.ld_alpha, self.wpo, self.log_logits = cache_reference, ld_alpha, wpo, log_logits

    def segments(self, batch: Mapping[str, Any]) -> Segments:
        """Each prompt with its two completions."""
        return pair_segments(batch, takes=COLUMNS)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Also moves a reference that follows the policy, before the step that is the first to see it moved."""
        if self.sync is not None:
            self.sync.after(self.global_step)
        return super().on_train_batch_start(batch, batch_idx)

    def extra_state(self) -> dict[str, Any]:
        """After which step the reference was moved."""
        return super().extra_state() | ({} if self.sync is None else {"reference_synced": self.sync.last})

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes it up."""
        super().load_extra_state(state)
        if self.sync is not None:
            self.sync.last = state.get("reference_synced", 0)

    def before_updates(self, pieces: list[Any]) -> list[Any]:
        """For losses that sort: gives each pair its partners among all pairs of the step."""
        if not self.sorts or (len(pieces) == 1 and self.trainer.world_size == 1):
            return pieces
        found = []
        for piece in pieces:
            segments = piece.get("segments") or self.segments(piece)
            pairs = score_pairs(self.policy, segments)
            logps = [self.compared(pairs.scores), self.reference_logps(piece, segments)]
            found.append({"logps": torch.cat(logps, dim=1), "counted": pairs.counted})
        rows, own = self.rows_of_step(found)
        logps, counted = rows["logps"], rows["counted"]
        partners = torch.zeros_like(logps[:, :2])
        partners[counted] = self.preference.partners(*logps[counted].unbind(1))
        known = {"reference_logps": logps[own, 2:], "partners": partners[own]}
        return [piece | part for piece, part in zip(pieces, cut_as(known, pieces), strict=True)]

    def objective(self, batch: dict[str, Any]) -> Objective:
        """The preference loss summed over pairs."""
        segments = batch.get("segments") or self.segments(batch)
        pairs = score_pairs(self.policy, segments, ask=self._asked())
        logps, reference_logps = self.compared(pairs.scores), batch.get("reference_logps")
        if reference_logps is None:
            reference_logps = self.reference_logps(batch, segments)
        losses, more = self._losses(batch, pairs, logps, reference_logps), {}
        if self.wpo and pairs.scores.collision is not None:
            likely = row_means(pairs.scores.token_logps.detach() - pairs.scores.collision, pairs.scores.mask)
            more["wpo_weight"] = likely.view(-1, 2).sum(dim=1).exp()
            losses = losses * more["wpo_weight"]
        if self.nll_coef:
            more["nll_loss"] = nll = _expected(-pairs.mean_logps, batch.get("label"))
            losses = losses + self.nll_coef * nll
        log_ratios = logps.detach() - reference_logps
        if self.preference.normalised:
            log_ratios = log_ratios / pairs.lengths.clamp(min=1)
        return pairs.objective(losses, self.beta * log_ratios, more, logits=self.log_logits)

    def _asked(self) -> list[Ask]:
        details = not self.training or self.logging_due
        asked: dict[Ask, bool] = {
            "entropy": details,
            "accuracy": details,
            "normalizer": details and self.log_logits,
            "mean_logp": details and self.log_logits,
            "collision": self.wpo,
        }
        return [name for name, wanted in asked.items() if wanted]

    def _losses(self, batch: Mapping[str, Any], pairs: ScoredPairs, logps: Tensor, reference_logps: Tensor) -> Tensor:
        """The preference losses, [pairs]; those that sort leave out pairs that are not counted."""
        rows = pairs.counted if self.sorts else torch.ones_like(pairs.counted)
        columns: dict[str, Any] = {"labels": batch.get("label"), "margins": batch.get("margin")}
        columns = {name: None if value is None else value.to(logps) for name, value in columns.items()}
        columns |= {"chosen_lengths": pairs.lengths[:, 0], "rejected_lengths": pairs.lengths[:, 1]}
        columns["partners"] = batch.get("partners")
        if self.sorts:  # nor may an uncounted pair take part in the others' order
            columns = {name: None if value is None else value[rows] for name, value in columns.items()}
            logps, reference_logps = logps[rows], reference_logps[rows]
        losses = self.preference(*logps.unbind(1), *reference_logps.unbind(1), **columns)
        return losses.new_zeros(len(rows)).index_put((rows,), losses) if self.sorts else losses

    def compared(self, scores: Scores) -> Tensor:
        """What the loss takes of a model's scores: log-probabilities over tokens, [pairs, 2]."""
        if self.ld_alpha == 1:
            return sequence_logps(scores.token_logps).view(-1, 2)
        shared = scores.mask.sum(dim=1).view(-1, 2).amin(dim=1).repeat_interleave(2)
        return length_desensitized_logps(scores.token_logps, scores.mask, shared, ld_alpha=self.ld_alpha).view(-1, 2)

    def reference_logps(self, batch: Mapping[str, Any], segments: Segments) -> Tensor:
        """The same under the reference, [pairs, 2]."""

        def compute() -> Tensor:
            with self.reference.reading() as reference:
                return self.compared(score(reference, segments))

        return self.reference.cached(pair_keys(batch), compute) if self.cache_reference else compute()

    def describe(self) -> dict[str, str]:
        """Adds the loss, its normaliser and what the reference is."""
        options = self.preference
        weights = options.weights or [1.0] * len(options.losses)
        names = " + ".join(
            name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(options.losses, weights, strict=True)
        )
        return super().describe() | {
            "loss": f"{names}, beta {options.beta}, label smoothing {options.label_smoothing}, nll_coef {self.nll_coef}"
            + f", divergence {options.f_divergence}" * (options.f_divergence != "reverse_kl")
            + f", ld_alpha {self.ld_alpha}" * (self.ld_alpha != 1)
            + f", dpop_coef {options.dpop_coef}" * (options.dpop_coef != 0)
            + ", pairs weighted by their probability" * self.wpo
            + "; sorts the pairs of the optimizer step, over all micro-batches and ranks" * self.sorts,
            "normaliser": "pairs of the optimizer step, over all micro-batches and ranks",
            "reference": f"{self.reference.describe()}{', log-probabilities cached' * self.cache_reference}"
            + ("" if self.sync is None else f", {self.sync.describe()}"),
        }


def _expected(values: Tensor, label: Tensor | None) -> Tensor:
    """Of `values` `[pairs, 2]` the better completion's, or what is expected of it."""
    if label is None:
        return values[:, 0]
    label = label.to(values)
    return label * values[:, 0] + (1 - label) * values[:, 1]


def _check_together(
    preference: Preference, ld_alpha: float, wpo: bool, cache_reference: bool, sync: SyncReference | None
) -> None:
    """Refuses options that contradict each other.

    Raises:
        ValueError: Naming them.
    """
    if ld_alpha != 1 and preference.of_means:
        raise ValueError(
            f"ld_alpha={ld_alpha} weighs the tokens of sums, and loss={preference.loss!r} compares means over tokens: "
            "leave it at 1, or use another loss (or ipo_logps='sum')"
        )
    if wpo and preference.sorts:
        raise ValueError(f"wpo=True weighs single pairs, and loss={preference.loss!r} sorts them: use another loss")
    if cache_reference and sync is not None:
        raise ValueError("cache_reference=True would keep what sync_reference changes: use one of them")
