"""NEFTune (arXiv:2310.05914): uniform noise on the input embeddings of one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.forward import language_model
from alignment_modules.policies.segments import Segments


def find_embedding(policy: nn.Module) -> nn.Module:
    """The module that turns a policy's token ids into vectors.

    Args:
        policy: Any module, also with peft adapters.

    Raises:
        ValueError: If it has none that can be found, or is compiled, so that noise would not reach its graph.
    """
    name = type(policy).__name__
    if hasattr(policy, "_orig_mod"):
        raise ValueError(f"neftune_alpha needs a policy that is not compiled, and {name} is: leave one of them out")
    find = getattr(language_model(policy) or policy, "get_input_embeddings", None)
    found = None if find is None else find()
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"neftune_alpha needs the policy's input embeddings, and {name} has no get_input_embeddings() that gives a "
            "module: define it, or leave neftune_alpha out"
        )
    return found


class EmbeddingNoise:
    """Noise for the tokens of segments: `alpha / sqrt(L d)` times a number from -1 to 1 for each entry.

    L is the number of tokens of the token's document, also of those that are not computed because no read depends on
    them, and d the width of the embeddings. Drawn once, from torch's generator of the device, as dropout is.

    Args:
        policy: Whose input embeddings.
        segments: What is read; no segment has a parent.
        alpha: Above 0.

    Raises:
        ValueError: If the policy has no input embeddings, or segments share prompts.
    """

    def __init__(self, policy: nn.Module, segments: Segments, alpha: float) -> None:
        if max(segments.parents) >= 0:
            raise ValueError("neftune_alpha is for documents of their own, and these segments share prompts")
        self.embedding = find_embedding(policy)
        of_tokens = torch.tensor(segments.given_lengths).repeat_interleave(torch.tensor(segments.lengths))
        self._scale = (alpha / of_tokens.sqrt()).to(segments.token_ids.device, non_blocking=True)
        self._noise: Tensor | None = None

    @contextmanager
    def at(self, places: Tensor) -> Iterator[None]:
        """Inside the block, which holds one forward pass, the embeddings have the noise added.

        Args:
            places: `[rows, time]` int64, which token of the segments stands where in the pass.

        Raises:
            ValueError: If the pass reads other inputs than these, or its embeddings not exactly once.
        """
        calls = 0

        def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if output.shape[:-1] != places.shape:
                found = f"gave {tuple(output.shape)} for ids of {tuple(places.shape)}"
                raise ValueError(f"neftune_alpha: the policy's input embeddings {found}")
            return output + self._drawn(output)[places].to(output.dtype)

        handle = self.embedding.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
        if calls != 1:
            raise ValueError(f"neftune_alpha: a forward pass read the input embeddings {calls} times; expected is once")

    def _drawn(self, output: Tensor) -> Tensor:
        """The noise, `[tokens, d]` float32, on the device of the embeddings."""
        if self._noise is None:
            size = (len(self._scale), output.shape[-1])
            uniform = torch.empty(size, dtype=torch.float32, device=output.device).uniform_(-1, 1)
            self._noise = uniform * (self._scale.to(output.device) / size[1] ** 0.5)[:, None]
        return self._noise
