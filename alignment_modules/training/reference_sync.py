"""References that follow the policy in steps (TR-DPO, arXiv:2404.09656)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from alignment_modules.functional.ranges import Count, Share, check_options
from alignment_modules.policies.frozen import Frozen


@dataclass(frozen=True)
class SyncReference:
    """When and how far a reference is moved towards its policy.

    Args:
        alpha: The reference becomes `alpha * policy + (1 - alpha) * reference`: the paper's soft update, whose best
            share is 0.5 to 0.6; 1 takes the policy over (its hard update).
        every_n_steps: Optimizer steps between two updates; the paper uses 256 to 1024 for hard ones.

    Raises:
        ValueError: If an option is out of range.
    """

    alpha: Share = 0.6
    every_n_steps: Count = 512

    def __post_init__(self) -> None:
        check_options(SyncReference, vars(self))
        if self.alpha == 0:
            raise ValueError(
                "sync_reference.alpha=0.0 never moves the reference: give more, or leave sync_reference out"
            )

    @classmethod
    def of(cls, given: SyncReference | Mapping[str, Any] | None) -> SyncReference | None:
        """The value of an option that may be a dictionary.

        Raises:
            ValueError: If a key is no option, or as for the class.
        """
        if not isinstance(given, Mapping):
            return given
        known = [option.name for option in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"sync_reference has no option {unknown[0]!r}; allowed are {known}")
        return cls(**given)


class ReferenceSync:
    """Moves a reference, once at every so many optimizer steps, however often it is asked.

    Args:
        reference: A companion that is `saved`.
        options: When and how far.

    Raises:
        ValueError: The reference has other parameters than the policy.
    """

    def __init__(self, reference: Frozen, options: SyncReference) -> None:
        reference.check_refreshable()
        self.reference, self.options = reference, options
        self.last = 0
        """The optimizer step after which the reference was moved last."""

    def after(self, step: int) -> None:
        """Moves the reference where it is due.

        Args:
            step: Optimizer steps taken so far.
        """
        if step > self.last and step % self.options.every_n_steps == 0:
            self.reference.refresh(self.options.alpha)
            self.last = step

    def describe(self) -> str:
        """What is done when, for people."""
        share = (
            "replaced by the policy" if self.options.alpha == 1 else f"moved to {self.options.alpha:g} of the policy"
        )
        return f"{share} every {self.options.every_n_steps} optimizer steps"
