"""Supervised fine-tuning: the negative log-likelihood of a step's supervised tokens, averaged over all of them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from alignment_modules.functional import aggregate
from alignment_modules.functional.ranges import NonNegative, Range, check_options
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.scoring import Ask, score
from alignment_modules.policies.segments import Segments
from alignment_modules.training.module import AlignmentModule
from alignment_modules.training.objective import Objective


class SFTModule(AlignmentModule):
    r"""Supervised fine-tuning on batches of `input_ids`, `labels` (-100 where not supervised) and `attention_mask`.

    The loss of a step is `-sum(log p(token)) / number of supervised tokens`, over all micro-batches and ranks.

    Args:
        loss: "nll", or "dft" (dynamic fine-tuning, arXiv:2508.05629): each token's negative log-likelihood is weighted
            by its own detached probability.
        label_smoothing: Share of the target distribution spread evenly over the vocabulary, in [0, 1).
        z_loss: Coefficient of `logsumexp(logits)^2`, which keeps the softmax normaliser near 1 (PaLM,
            arXiv:2204.02311).
        **common: Keywords of `AlignmentModule`: policy, optimizer, lr_scheduler, tokenizer, evaluation.

    Raises:
        ValueError: If an option has a value that is not allowed.
    """

    paradigm = "sft"
    batch_keys = ("input_ids", "labels")
    bar = ("loss", "mean_token_accuracy")

    def __init__(
        self,
        *,
        loss: Literal["nll", "dft"] = "nll",
        label_smoothing: Annotated[float, Range(0, 1, "[)")] = 0.0,
        z_loss: NonNegative = 0.0,
        **common: Any,
    ) -> None:
        check_options(SFTModule.__init__, locals())
        super().__init__(**common)
        self.loss, self.label_smoothing, self.z_loss = loss, label_smoothing, z_loss

    def segments(self, batch: Mapping[str, Any]) -> Segments:
        """What is read of a batch; on the host when it comes from the loader, and carried over with it."""
        return Segments.from_labels(
            batch["input_ids"], batch["labels"], batch.get("attention_mask"), batch.get("position_ids")
        )

    def objective(self, batch: dict[str, Any]) -> Objective:
        """Negative log-likelihood summed over the supervised tokens."""
        segments = batch.get("segments") or self.segments(batch)
        asked: dict[Ask, bool] = {
            "entropy": not self.training or self.logging_due,
            "accuracy": not self.training or self.logging_due,
            "normalizer": self.z_loss > 0,
            "mean_logp": self.label_smoothing > 0,
        }
        scores = score(self.policy, segments, ask=[name for name, wanted in asked.items() if wanted])
        nll = -scores.token_logps
        loss = nll * nll.detach().neg().exp() if self.loss == "dft" else nll
        if scores.mean_logp is not None:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * scores.mean_logp
        if scores.normalizer is not None:
            loss = loss + self.z_loss * scores.normalizer.square()
        total, weight = aggregate(loss, scores.mask, reduction="token_mean")
        statistics = {"loss": Statistic(total, weight)}
        if scores.correct is not None and scores.entropy is not None:
            statistics["mean_token_accuracy"] = Statistic(scores.correct.sum(), weight)
            statistics["entropy"] = Statistic(scores.entropy.detach().sum(), weight)
        return Objective.of(total, weight, statistics)

    def describe(self) -> dict[str, str]:
        """Adds the loss and its normaliser."""
        terms = f"{self.loss}, label smoothing {self.label_smoothing}, z-loss {self.z_loss}"
        return super().describe() | {
            "loss": terms,
            "normaliser": "supervised tokens of the optimizer step, over all micro-batches and ranks",
        }
