"""Direct preference optimization (arXiv:2305.18290) and the losses of its family, against a frozen reference."""

import hashlib
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from alignment_modules.base import AlignmentModule
from alignment_modules.functional import BATCH_COUPLED_LOSSES, Preference, sequence_logps
from alignment_modules.functional.ranges import NonNegative, Positive, Range, Share, check_options
from alignment_modules.objective import Objective, Statistic
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.reference import build_reference, reference_mode, weights_mark
from alignment_modules.policies.scoring import Scores, score
from alignment_modules.policies.segments import Segments


class DPOModule(AlignmentModule):
    r"""Direct preference optimization on batches of prompt, chosen and rejected completion.

    With `h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))`, the default loss is
    `-log sigmoid(beta * h)`, averaged over the pairs of the whole optimizer step. Prompts are computed once a pair.

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
        **common: Keywords of `AlignmentModule`: policy, optimizer, lr_scheduler, tokenizer, evaluation.

    Raises:
        ValueError: If an option has a value that is not allowed, or options contradict each other.
    """

    paradigm = "dpo"
    batch_keys = (
        "prompt_input_ids",
        "prompt_attention_mask",
        "chosen_input_ids",
        "chosen_attention_mask",
        "rejected_input_ids",
        "rejected_attention_mask",
    )
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
        self.preference, self.beta, self.nll_coef = preference, beta, nll_coef
        self.reference = build_reference(reference, self.policy)
        self.cache_reference = cache_reference
        self._reference_cache: dict[bytes, Tensor] = {}
        self._reference_mark = b""

    def objective(self, batch: dict[str, Any]) -> Objective:
        """The preference loss summed over pairs."""
        loss_masks = (batch.get(f"{side}_loss_mask") for side in ("chosen", "rejected"))
        segments = Segments.from_pairs(*(batch[key] for key in self.batch_keys), *loss_masks)
        details = not self.training or self.logging_due
        scores = score(self.policy, segments, ask=["entropy", "accuracy"] if details else [])
        logps = sequence_logps(scores.token_logps).view(-1, 2)
        lengths = scores.mask.sum(dim=1).view(-1, 2)
        reference_logps = self.reference_logps(batch, segments)
        # A pair without a scored token in either completion compares nothing.
        counted = lengths.amin(dim=1) > 0
        if self.preference.loss in BATCH_COUPLED_LOSSES:  # nor may it take part in the others' order
            logps, lengths, reference_logps = logps[counted], lengths[counted], reference_logps[counted]
            counted = counted[counted]
        losses = self.preference(
            *logps.unbind(1),
            *reference_logps.unbind(1),
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1],
        )
        if self.nll_coef:
            losses = losses - self.nll_coef * logps[:, 0] / lengths[:, 0].clamp(min=1)
        total = (losses * counted).sum()
        statistics = self.statistics(total, counted, logps.detach(), reference_logps)
        statistics |= _token_statistics(scores)
        return Objective.of(total, counted.sum(), statistics)

    def reference_logps(self, batch: dict[str, Any], segments: Segments) -> Tensor:
        """Summed log-probabilities under the reference, [pairs, 2]."""
        if not self.cache_reference:
            return self._score_reference(segments)
        if self._reference_cache and weights_mark(self.policy, self.reference) != self._reference_mark:
            self._reference_cache.clear()
        keys = self._pair_keys(batch)
        if keys and all(key in self._reference_cache for key in keys):
            return torch.stack([self._reference_cache[key] for key in keys])
        logps = self._score_reference(segments)
        self._reference_cache.update(zip(keys, logps.clone().unbind(), strict=True))
        self._reference_mark = weights_mark(self.policy, self.reference)  # as the forward pass leaves them
        return logps

    def _score_reference(self, segments: Segments) -> Tensor:
        with reference_mode(self.policy, self.reference) as reference:
            return sequence_logps(score(reference, segments).token_logps).view(-1, 2)

    def _pair_keys(self, batch: dict[str, Any]) -> list[bytes]:
        """One key a pair, made of its tokens and of those not scored: data sets and splits are never mixed up."""
        sides = []
        for name in ("prompt", "chosen", "rejected"):
            mask = batch[f"{name}_attention_mask"].cpu().bool()
            sides.append((batch[f"{name}_input_ids"].cpu(), mask))
            loss_mask = batch.get(f"{name}_loss_mask")
            sides.append((mask & (mask if loss_mask is None else loss_mask.cpu().bool()), mask))
        keys = []
        for row in range(len(sides[0][0])):
            parts = [values[row][mask[row]].tolist() for values, mask in sides]
            keys.append(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest())
        return keys

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
        coupled = "; couples the pairs of a micro-batch, so it depends on how a batch is split"
        return super().describe() | {
            "loss": f"{options.loss}, beta {options.beta}, label smoothing {options.label_smoothing}, "
            f"nll_coef {self.nll_coef}"
            + f", divergence {options.f_divergence}" * (options.f_divergence != "reverse_kl")
            + (coupled if options.loss in BATCH_COUPLED_LOSSES else ""),
            "normaliser": "pairs of the optimizer step, over all micro-batches and ranks",
            "reference": "the policy, adapter off"
            if self.reference is None
            else f"{type(self.reference).__name__}, frozen{', log-probabilities cached' * self.cache_reference}",
        }


def _token_statistics(scores: Scores) -> dict[str, Statistic]:
    if scores.correct is None or scores.entropy is None:
        return {}
    chosen, mask = scores.correct[0::2], scores.mask[0::2]
    return {
        "mean_token_accuracy": Statistic((chosen & mask).sum(), mask.sum()),
        "entropy": Statistic(scores.entropy.detach().sum(), scores.mask.sum()),
    }
