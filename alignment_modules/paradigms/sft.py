"""Supervised fine-tuning: the negative log-likelihood of a step's supervised tokens, averaged over all of them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from torch import Tensor

from alignment_modules.functional import aggregate_rows
from alignment_modules.functional.ranges import NonNegative, Positive, Range, check_options
from alignment_modules.functional.statistics import RowSums
from alignment_modules.policies.noise import find_embedding
from alignment_modules.policies.reading import read
from alignment_modules.policies.scoring import Ask, score
from alignment_modules.policies.segments import Segments
from alignment_modules.training.balancing import SHARES, ExpertBalance
from alignment_modules.training.loss_weights import LOSS_WEIGHTS, label_segments, row_weights, weigh
from alignment_modules.training.objective import Objective
from alignment_modules.training.updates import UpdateModule


class SFTModule(UpdateModule):
    r"""Supervised fine-tuning on batches of `input_ids`, `labels` (-100 where not supervised) and `attention_mask`.

    The loss of a step is `-sum(log p(token)) / number of supervised tokens`, over all micro-batches and ranks.

    Batches may bring `loss_weights` `[batch, time]`, a finite number of at least 0 for each supervised token. The loss
    is then `sum(w * loss of the token) / sum(w)` over the step: the weights enter the normaliser, so only their ratios
    count, and not their scale. A token of weight 0 is not supervised. `loss` is logged as it is minimised, with the
    weights; `mean_token_accuracy` and `entropy` are means over the supervised tokens, each alike.

    Where a mixture of experts asks for it in its configuration (`output_router_logits` and `router_aux_loss_coef`), its
    load-balancing loss is added, averaged over the tokens of the step. The shares of tokens that the experts get are
    counted first, without gradients, over all micro-batches and ranks. Such a module takes its optimizer steps itself,
    one a batch (`micro_batch_size` and `max_grad_norm` here, in place of the Trainer's accumulation and clipping).
    Validation counts the shares of each batch.

    Args:
        loss: "nll", or "dft" (dynamic fine-tuning, arXiv:2508.05629): each token's negative log-likelihood is weighted
            by its own detached probability.
        label_smoothing: Share of the target distribution spread evenly over the vocabulary, in [0, 1).
        z_loss: Coefficient of `logsumexp(logits)^2`, which keeps the softmax normaliser near 1 (PaLM,
            arXiv:2204.02311).
        neftune_alpha: In training, adds noise to the input embeddings: `alpha / sqrt(L d)` times a uniform number from
            -1 to 1 for each entry, L the tokens of the row (with packing, of the document) and d the width (NEFTune,
            arXiv:2310.05914, section 2; it uses 5, 10 and 15). Validation, test, predict and export see none. It is
            drawn as dropout is: anew for each micro-batch, and again alike by a run that resumes with `ExactResume`.
            None: no noise.
        **common: Keywords of `AlignmentModule` (policy, optimizer, lr_scheduler, tokenizer, evaluation) and, for a
            mixture of experts that is balanced, of `UpdateModule` (micro_batch_size, max_grad_norm).

    Raises:
        ValueError: If an option has a value that is not allowed, or noise is asked for and the policy's input
            embeddings cannot be found.
    """

    paradigm = "sft"
    batch_keys = ("input_ids", "labels")
    balances_experts = True
    bar = ("loss", "mean_token_accuracy")

    def __init__(
        self,
        *,
        loss: Literal["nll", "dft"] = "nll",
        label_smoothing: Annotated[float, Range(0, 1, "[)")] = 0.0,
        z_loss: NonNegative = 0.0,
        neftune_alpha: Positive | None = None,
        **common: Any,
    ) -> None:
        check_options(SFTModule.__init__, locals())
        super().__init__(**common)
        self.loss, self.label_smoothing, self.z_loss = loss, label_smoothing, z_loss
        self.neftune_alpha = neftune_alpha
        if neftune_alpha is not None:
            find_embedding(self.policy)
        self.balance = ExpertBalance.of(self.policy)
        self.automatic_optimization = self.balance is None

    def segments(self, batch: Mapping[str, Any]) -> Segments:
        """What is read of a batch; on the host when it comes from the loader, and carried over with it."""
        return label_segments(batch)

    def before_updates(self, pieces: list[Any]) -> list[Any]:
        """For experts that are balanced: gives each piece the step's shares."""
        if self.balance is None:
            return pieces
        return self.balance.give_shares(self, pieces, neftune_alpha=self.neftune_alpha)

    def units(self, piece: Any) -> dict[str, Tensor] | None:
        """For experts that are balanced: the weights of the supervised tokens, and the computed tokens."""
        if self.balance is None:
            return None
        segments = piece.get("segments") or self.segments(piece)
        return self.balance.units({"loss": row_weights(segments.mask(), piece.get(LOSS_WEIGHTS))}, segments)

    def objective(self, batch: dict[str, Any]) -> Objective:
        """Negative log-likelihood summed over the supervised tokens, by their weights."""
        segments = batch.get("segments") or self.segments(batch)
        asked: dict[Ask, bool] = {
            "entropy": not self.training or self.logging_due,
            "accuracy": not self.training or self.logging_due,
            "normalizer": self.z_loss > 0,
            "mean_logp": self.label_smoothing > 0,
        }
        noise, reading = self.neftune_alpha if self.training else None, None
        if self.balance is not None or noise is not None:
            reading = read(self.policy, segments, routers=self.balance is not None, neftune_alpha=noise)
        scores = score(reading or self.policy, segments, ask=[name for name, wanted in asked.items() if wanted])
        nll = -scores.token_logps
        loss = nll * nll.detach().neg().exp() if self.loss == "dft" else nll
        if scores.mean_logp is not None:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * scores.mean_logp
        if scores.normalizer is not None:
            loss = loss + self.z_loss * scores.normalizer.square()
        weights = batch.get(LOSS_WEIGHTS)
        losses, tokens = aggregate_rows(weigh(loss, scores.mask, weights), scores.mask, reduction="token_mean")
        rows: dict[str, RowSums] = {}
        if scores.correct is not None and scores.entropy is not None:
            rows["mean_token_accuracy"] = RowSums(scores.correct.sum(dim=1), tokens)
            rows["entropy"] = RowSums(scores.entropy.sum(dim=1), tokens)
        units = tokens if weights is None else row_weights(scores.mask, weights)
        found = Objective.of_rows(losses, units, rows=rows)
        if self.balance is None or reading is None:
            return found
        return self.balance.add(found, reading, batch.get(SHARES))

    def describe(self) -> dict[str, str]:
        """Adds the loss and its normaliser."""
        terms = f"{self.loss}, label smoothing {self.label_smoothing}, z-loss {self.z_loss}"
        balance = {} if self.balance is None else {"router loss": self.balance.describe()}
        if self.neftune_alpha is not None:
            terms += f", noise on the embeddings with alpha {self.neftune_alpha}"
        return super().describe() | {
            "loss": terms,
            "normaliser": "supervised tokens of the optimizer step (their loss_weights, where batches have some), over "
            "all micro-batches and ranks",
            **balance,
        }
