"""The chance that one of several samples is right."""

import torch
from torch import Tensor

__all__ = ["pass_at_k"]


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
