"""Preference optimization without a reference: CPO (arXiv:2401.08417), SimPO (arXiv:2405.14734) and AlphaPO."""

from collections.abc import Mapping
from typing import Annotated, Any

from alignment_modules.functional import ReferenceFreeLoss, check_reference_free, reference_free_loss
from alignment_modules.functional.ranges import Finite, NonNegative, Positive, Range, check_options
from alignment_modules.functional.reference_free import FORMS
from alignment_modules.policies.segments import Segments
from alignment_modules.training.module import AlignmentModule
from alignment_modules.training.objective import Objective
from alignment_modules.training.pairs import PAIR_KEYS, pair_segments, score_pairs


class CPOModule(AlignmentModule):
    r"""Contrastive preference optimization and its kin on batches of prompt, chosen and rejected completion.

    With `d = log pi(chosen) - log pi(rejected)`, the default loss of a pair is
    `-log sigmoid(beta * d) + nll_coef * NLL(chosen)`, averaged over the pairs of the whole optimizer step; the negative
    log-likelihood is each chosen completion's mean over its tokens. "simpo" takes mean log-probabilities over tokens
    and a margin: `-log sigmoid(beta * d - gamma)`. "ipo" takes means as well, and so does every loss with `alpha`.
    Prompts are computed once a pair.

    Args:
        loss: "sigmoid" (CPO), "hinge", "ipo" or "simpo".
        beta: Scale of the difference. None: 2.0 for "simpo" (its paper uses 2.0 to 2.5), else 0.1 (CPO's).
        gamma: SimPO's target margin; `gamma / beta` should be 0.3 to 0.5. None: 1.0 for "simpo"; others have none.
        alpha: AlphaPO (arXiv:2501.03884): `(1 - p^-alpha) / alpha` in place of `log p`, `p` the mean token probability.
            Its paper uses "simpo" with 0.25; 0: `log p`.
        nll_coef: Weight of the chosen completion's negative log-likelihood. None: 1.0 as in CPO's paper, but 0 for
            "simpo" and with `alpha`, whose papers have none.
        label_smoothing: Share of pairs assumed to be labelled the wrong way round, in [0, 0.5), for "sigmoid" and
            "simpo".
        **common: Keywords of `AlignmentModule`: policy, optimizer, lr_scheduler, tokenizer, evaluation.

    Raises:
        ValueError: If an option has a value that is not allowed, or no effect on this loss.
    """

    paradigm = "cpo"
    batch_keys = PAIR_KEYS
    compares_log_probs = True  # of two completions, whose dropout would differ
    bar = ("loss", "rewards/accuracies", "rewards/margins")

    def __init__(
        self,
        *,
        loss: ReferenceFreeLoss = "sigmoid",
        beta: Positive | None = None,
        gamma: NonNegative | None = None,
        alpha: Finite = 0.0,
        nll_coef: NonNegative | None = None,
        label_smoothing: Annotated[float, Range(0, 0.5, "[)")] = 0.0,
        **common: Any,
    ) -> None:
        check_options(CPOModule.__init__, locals())
        simpo = loss == "simpo"
        margin = (1.0 if simpo else 0.0) if gamma is None else gamma
        check_reference_free(loss=loss, label_smoothing=label_smoothing, gamma=margin)
        super().__init__(**common)
        self.options: dict[str, Any] = {
            "loss": loss,
            "beta": (2.0 if simpo else 0.1) if beta is None else beta,
            "gamma": margin,
            "alpha": alpha,
            "label_smoothing": label_smoothing,
        }
        self.nll_coef = (0.0 if simpo or alpha else 1.0) if nll_coef is None else nll_coef
        self.takes_means = FORMS[loss].of_means or alpha != 0

    def segments(self, batch: Mapping[str, Any]) -> Segments:
        """Each prompt with its two completions."""
        return pair_segments(batch)

    def objective(self, batch: dict[str, Any]) -> Objective:
        """The loss summed over pairs."""
        details = not self.training or self.logging_due
        pairs = score_pairs(
            self.policy, batch.get("segments") or self.segments(batch), ask=["entropy", "accuracy"] if details else []
        )
        logps = pairs.mean_logps if self.takes_means else pairs.logps
        losses, nll = reference_free_loss(*logps.unbind(1), **self.options), -pairs.mean_logps[:, 0]
        if self.nll_coef:
            losses = losses + self.nll_coef * nll
        return pairs.objective(losses, self.options["beta"] * logps, {"nll_loss": nll})

    def describe(self) -> dict[str, str]:
        """Adds the loss and its normaliser."""
        used = {name: value for name, value in self.options.items() if name == "beta" or (name != "loss" and value)}
        told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in used.items())
        of = "means" if self.takes_means else "sums"
        return super().describe() | {
            "loss": f"{self.options['loss']} of {of} over tokens, {told}, nll_coef {self.nll_coef}",
            "normaliser": "pairs of the optimizer step, over all micro-batches and ranks",
        }
