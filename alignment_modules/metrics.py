"""Metrics for language models: every mean carries its weight, so neither batch size nor number of processes matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from alignment_modules.functional.ranges import Count, check_options
from alignment_modules.rewards.verifiers import ExactMatch as ExactMatchVerifier

__all__ = ["ExactMatch", "PassAtK", "Perplexity", "TokenWeightedMean", "pass_at_k"]


class TokenWeightedMean(Metric):
    """The mean of a quantity over all tokens seen, on all processes: sum of values over sum of weights.

    NaN before the first token.

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Examples:
        >>> metric = TokenWeightedMean()
        >>> metric.update(torch.tensor([[1.0, 2.0], [6.0, 0.0]]), mask=torch.tensor([[1, 1], [1, 0]]))
        >>> metric.compute().item()
        3.0
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Adds one batch.

        Args:
            values: Any shape; entries outside the mask may be anything, NaN included.
            mask: Same shape, bool or weights of 0 and more; None: all entries count once.

        Raises:
            ValueError: If the shapes differ.
        """
        values = values.detach().double()
        if mask is None:
            self.total += values.sum()
            self.weight += values.numel()
            return
        if mask.shape != values.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be that of values, {tuple(values.shape)}")
        weights = mask.detach().double()
        self.total += torch.where(weights != 0, values * weights, 0.0).sum()
        self.weight += weights.sum()

    def compute(self) -> Tensor:
        """The mean, a float32 scalar."""
        return (self.total / self.weight).float()


class Perplexity(TokenWeightedMean):
    """`exp` of the mean negative log-probability over all tokens seen.

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Examples:
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor([[0.5, 0.125]]).log(), mask=torch.ones(1, 2))
        >>> round(metric.compute().item(), 4)
        4.0
    """

    is_differentiable = False
    higher_is_better = False

    def update(self, token_logps: Tensor, mask: Tensor | None = None) -> None:
        """Adds one batch.

        Args:
            token_logps: Natural log-probabilities of the target tokens, [batch, time].
            mask: Which of them count, [batch, time]; None: all.
        """
        super().update(-token_logps, mask)

    def compute(self) -> Tensor:
        """The perplexity, a float32 scalar."""
        return (self.total / self.weight).exp().float()


class ExactMatch(Metric):
    """The share of texts that are the expected ones, after white space at both ends is removed.

    Args:
        strip: Whether white space at both ends is ignored.
        ignore_case: Whether case is ignored.
        extract: A regular expression; its last match in the text (its first group, if it has one) is compared.
        **kwargs: Options of `torchmetrics.Metric`.

    Examples:
        >>> metric = ExactMatch()
        >>> metric.update(["4", " 5", "7"], ["4", "5", "6"])
        >>> round(metric.compute().item(), 4)
        0.6667
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    count: Tensor

    def __init__(
        self, strip: bool = True, ignore_case: bool = False, extract: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._verifier = ExactMatchVerifier("expected", strip=strip, ignore_case=ignore_case, extract=extract)
        self.add_state("correct", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], expected: Sequence[Any]) -> None:
        """Adds one batch.

        Args:
            texts: What was generated.
            expected: What is right, one entry per text; a list of accepted texts, or None where nothing is known.

        Raises:
            ValueError: If the numbers of texts differ.
        """
        if len(texts) != len(expected):
            raise ValueError(f"expected has {len(expected)} entries for {len(texts)} texts")
        scores = [score for score in self._verifier(completions=list(texts), expected=expected) if score is not None]
        self.correct += int(sum(scores))
        self.count += len(scores)

    def compute(self) -> Tensor:
        """The share, a float32 scalar; NaN before the first text."""
        return (self.correct.double() / self.count.double()).float()


class PassAtK(Metric):
    """The unbiased chance that at least one of k samples is right, averaged over prompts (arXiv:2107.03374, eq. 1).

    Of n >= k samples of a prompt, c right: `1 - C(n - c, k) / C(n, k)`.

    Args:
        k: Samples drawn.
        **kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If `k` is not positive.

    Examples:
        >>> metric = PassAtK(2)
        >>> metric.update(torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]))
        >>> metric.compute().item()
        0.25
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, k: Count, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_options(PassAtK.__init__, locals())
        self.k = k
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct: Tensor) -> None:
        """Adds prompts.

        Args:
            correct: Whether each sample is right, bool or 0 and 1, [prompts, samples].

        Raises:
            ValueError: If the shape is another, there are fewer than k samples, or an entry is neither 0 nor 1.
        """
        estimates = pass_at_k(correct, self.k)
        self.total += estimates.sum()
        self.count += len(estimates)

    def compute(self) -> Tensor:
        """The mean over prompts, a float32 scalar; NaN before the first prompt."""
        return (self.total / self.count).float()


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """The unbiased estimate of pass@k for each prompt: `1 - C(n - c, k) / C(n, k)` (arXiv:2107.03374, eq. 1).

    Args:
        correct: Whether each sample is right, bool or 0 and 1, [prompts, samples].
        k: Samples drawn, from 1 to the number of samples.

    Returns:
        One probability per prompt, [prompts], float64.

    Raises:
        ValueError: If the shape is another, k does not fit, or an entry is neither 0 nor 1.

    Examples:
        >>> pass_at_k(torch.tensor([[1, 0, 0, 0]]), k=2).tolist()
        [0.5]
    """
    if correct.ndim != 2:
        raise ValueError(f"correct has shape {tuple(correct.shape)}; it must be [prompts, samples]")
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must lie within [1, {samples}], the number of samples of each prompt")
    hits = correct.double()
    if not bool(((hits == 0) | (hits == 1)).all()):
        raise ValueError("correct must hold 0 and 1 only")
    wrong = samples - hits.sum(1, keepdim=True)
    # C(wrong, k) / C(samples, k) as a product of ratios, which neither overflows nor needs factorials
    drawn = torch.arange(k, device=correct.device, dtype=torch.float64)
    return 1.0 - ((wrong - drawn).clamp(min=0) / (samples - drawn)).prod(1)
