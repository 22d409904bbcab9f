"""Checks of options, with one wording for all functions."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from alignment_modules.functional.ranges import Range


def check_choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is allowed.

    Raises:
        ValueError: If it is not, listing what is.

    >>> check_choice("loss", "hinge", ["hinge", "ipo"])
    'hinge'
    """
    choices = list(allowed)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_positive(name: str, value: float) -> float:
    """Return `value` if it is positive.

    Raises:
        ValueError: If it is zero, negative or not finite.

    >>> check_positive("beta", 0.1)
    0.1
    """
    if value not in Range(0, ends="()"):
        raise ValueError(f"{name}={value} must be a finite number > 0")
    return value


def check_same_shape(**tensors: Tensor) -> None:
    """Compare all tensors' shapes with the first one's.

    Raises:
        ValueError: If one differs, naming both.
    """
    names = list(tensors)
    for name in names[1:]:
        if tensors[name].shape != tensors[names[0]].shape:
            raise ValueError(
                f"{name} must have the shape of {names[0]}, {tuple(tensors[names[0]].shape)}, "
                f"got {tuple(tensors[name].shape)}"
            )
