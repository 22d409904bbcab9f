"""Odds ratio preference optimization (arXiv:2403.07691): fine-tuning and preference in one loss, no reference."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from alignment_modules.functional import log_odds, odds_ratio_loss, sequence_logps
from alignment_modules.functional.ranges import NonNegative, check_options
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.segments import Segments
from alignment_modules.training.objective import Objective, Term
from alignment_modules.training.pairs import PAIR_KEYS, pair_segments, score_pairs
from alignment_modules.training.updates import UpdateModule


class ORPOModule(UpdateModule):
    r"""ORPO on batches of prompt, chosen and rejected completion, for a pretrained or fine-tuned policy.

    With `p` a completion's mean token probability (the exponential of its mean log-probability) and
    `odds = p / (1 - p)`, the loss of a pair is
    `NLL(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected))` (equation 6 of the paper). Prompts are
    computed once a pair.

    The odds ratio's term is averaged over the pairs of the whole optimizer step. The negative log-likelihood has a unit
    of its own. "pairs": each chosen completion's mean over its tokens, then the mean over pairs. "tokens": the mean
    over all chosen tokens of the step, as in fine-tuning, where long completions weigh more; the units of a step are
    then counted before its first backward pass, so that the module takes its own steps, one a batch.

    Args:
        beta: Weight of the odds ratio's term (`lambda` in the paper, which uses 0.1).
        nll_on_prompt: Whether the prompt's tokens, but for the first, belong to the negative log-likelihood, as in the
            authors' code.
        nll_unit: "pairs" or "tokens".
        **common: Keywords of `AlignmentModule` (policy, optimizer, lr_scheduler, tokenizer, evaluation) and, for
            "tokens", of `UpdateModule` (micro_batch_size, max_grad_norm).

    Raises:
        ValueError: If an option has a value that is not allowed.
    """

    paradigm = "orpo"
    batch_keys = PAIR_KEYS
    compares_log_probs = True  # of two completions, whose dropout would differ
    bar = ("loss", "rewards/accuracies", "nll_loss")

    def __init__(
        self,
        *,
        beta: NonNegative = 0.1,
        nll_on_prompt: bool = False,
        nll_unit: Literal["pairs", "tokens"] = "pairs",
        **common: Any,
    ) -> None:
        check_options(ORPOModule.__init__, locals())
        super().__init__(**common)
        self.automatic_optimization = nll_unit == "pairs"
        self.beta, self.nll_on_prompt, self.nll_unit = beta, nll_on_prompt, nll_unit

    def segments(self, batch: Mapping[str, Any]) -> Segments:
        """Each prompt with its two completions."""
        return pair_segments(batch, score_prompts=self.nll_on_prompt)

    def units(self, piece: Any) -> dict[str, Tensor] | None:
        """The tokens of the likelihood and the pairs, where both count."""
        if self.nll_unit == "pairs":
            return None
        lengths = (piece.get("segments") or self.segments(piece)).mask().sum(dim=1)
        pairs = len(lengths) // (3 if self.nll_on_prompt else 2)
        sides, prompts = lengths[: 2 * pairs].view(-1, 2), lengths[2 * pairs :]
        counted = sides.amin(dim=1) > 0
        tokens = sides[:, 0] + (prompts if self.nll_on_prompt else 0)
        return {"nll": tokens * counted, "odds_ratio": counted}

    def objective(self, batch: dict[str, Any]) -> Objective:
        """The likelihood summed over its unit, the odds ratio's term over pairs."""
        segments = batch.get("segments") or self.segments(batch)
        details = not self.training or self.logging_due
        pairs = score_pairs(
            self.policy, segments, ask=["entropy", "accuracy"] if details else [], score_prompts=self.nll_on_prompt
        )
        counted, mean_logps = pairs.counted, pairs.mean_logps
        nll, tokens = -pairs.logps[:, 0], pairs.lengths[:, 0]
        if pairs.prompts is not None:
            nll, tokens = nll - sequence_logps(pairs.prompts.token_logps), tokens + pairs.prompts.mask.sum(dim=1)
        # An empty side has log-probability 0, whose odds are infinite.
        chosen, rejected = torch.where(counted[:, None], mean_logps, -1.0).unbind(1)
        ratio = odds_ratio_loss(chosen, rejected)
        mean_nll = nll / tokens.clamp(min=1)
        difference = log_odds(chosen) - log_odds(rejected)
        more = {"nll_loss": mean_nll, "log_odds_ratio": -ratio, "log_odds_chosen": difference}
        found = pairs.objective(mean_nll + self.beta * ratio, self.beta * mean_logps, more)
        return found if self.nll_unit == "pairs" else self._of_tokens(found, nll, tokens, ratio, counted)

    def _of_tokens(self, found: Objective, nll: Tensor, tokens: Tensor, ratio: Tensor, counted: Tensor) -> Objective:
        """The two terms, each with the number of its units."""
        terms = {
            "nll": Term.of_rows(nll * counted, tokens * counted),
            "odds_ratio": Term.of_rows(ratio * counted, counted, self.beta),
        }
        totals = [terms["nll"].total.detach(), -terms["odds_ratio"].scaled.detach()]
        units = torch.stack([term.weight for term in terms.values()])
        own = {
            "loss": Statistic(torch.stack(totals), units, "difference"),
            "nll_loss": Statistic(totals[0], units[0]),
        }
        return replace(found, terms=terms, statistics=found.statistics | own)

    def describe(self) -> dict[str, str]:
        """Adds the loss and its normaliser."""
        of = "prompt and chosen completion" if self.nll_on_prompt else "the chosen completion"
        unit = "tokens" if self.nll_unit == "tokens" else "its mean over tokens"
        return super().describe() | {
            "loss": f"nll of {of} ({unit}), odds ratio with weight {self.beta}",
            "normaliser": "pairs"
            + " (nll: tokens)" * (self.nll_unit == "tokens")
            + " of the optimizer step, over all micro-batches and ranks",
        }
