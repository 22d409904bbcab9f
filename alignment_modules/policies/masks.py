"""What the masks of a batch may say, checked on the host: which tokens exist, and which of them are scored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Brings integer or boolean tensors to the CPU as int64, in one transfer when they are elsewhere.

    Args:
        tensors: At least one, all on the same device.
    """
    if tensors[0].device.type == "cpu":
        return [tensor.to(torch.int64) for tensor in tensors]
    flat = torch.cat([tensor.to(tensors[0].device, torch.int64).flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def check_shape(name: str, value: Tensor, like: Tensor | None = None) -> Tensor:
    """Refuses tensors that are not `[batch, time]`, or not of the shape of the one they belong to.

    Args:
        name: What the tensor is called in the message.
        value: The tensor, which is returned.
        like: The token ids that it belongs to.

    Raises:
        ValueError: If it is of another shape.
    """
    if value.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected [batch, time]")
    if like is not None and value.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected its token ids' shape {tuple(like.shape)}")
    return value


def check_unbroken(name: str, mask: Tensor) -> Tensor:
    """Refuses a mask of existing tokens with a hole: padding stands before a row's tokens or after them, not between.

    What is in a row's context has to be computed. Which of its tokens are scored is for another mask to say.

    Args:
        name: What the mask is called in the message.
        mask: `[rows, time]`, nonzero where a token exists; on the host, where looking at it waits for no device.

    Returns:
        The mask as bool.

    Raises:
        ValueError: If a row has a zero between tokens; the message names the first.
    """
    real = mask != 0
    begins = real.clone()
    begins[:, 1:] &= ~real[:, :-1]
    broken = (begins.sum(dim=1) > 1).nonzero()
    if len(broken):
        row = int(broken[0])
        column = int(real[row].nonzero()[0])
        column += int((~real[row, column:]).nonzero()[0])
        raise hole(name, row, column)
    return real


def hole(name: str, row: int, column: int) -> ValueError:
    """The error about a mask of existing tokens that is 0 between them."""
    return ValueError(
        f"{name} has a hole: it is 0 at row {row}, column {column}, between tokens that exist. Padding may stand "
        "before a row's tokens or after them; a token that exists but is not scored is for the labels or a loss mask "
        "to name"
    )


def check_within(name: str, loss_mask: Tensor, mask_name: str, mask: Tensor) -> Tensor:
    """Refuses a loss mask that does not lie within the mask of the tokens that exist.

    Args:
        name: What the loss mask is called in the message.
        loss_mask: `[rows, time]`, nonzero where a token is scored; on the host.
        mask_name: What the mask is called.
        mask: `[rows, time]`, nonzero where a token exists; on the host.

    Returns:
        The loss mask.

    Raises:
        ValueError: If a token is scored that does not exist, or the shapes differ.
    """
    stray = ((check_shape(name, loss_mask, mask) != 0) & (mask == 0)).nonzero()
    if len(stray):
        row, column = stray[0].tolist()
        raise ValueError(
            f"{name} marks token {column} of row {row}, which does not exist: {mask_name} is 0 there; only tokens that "
            "exist can be scored"
        )
    return loss_mask
