"""What a row of the table of paradigms says (`tests/paradigms.py`)."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tests.batches import Batch


@dataclass(frozen=True)
class Resume:
    """When a run writes, from where it goes on, and where it is killed, in optimizer steps.

    Attributes:
        inside: Whether it is killed between the steps of one batch, inside a pass over a rollout.
    """

    options: tuple[str, ...]
    every: int = 2
    start: int = 4
    kill: int = 5
    inside: bool = False


@dataclass(frozen=True)
class Paradigm:
    """What the contract needs to know.

    Attributes:
        batch: Makes a batch of numbered rows, with so many more columns than needed, padded on one side.
        nothing: Ways to make one row hold nothing to learn from: each changes a batch at a row, in place.
        kind: Who steps: "automatic" (Lightning), "update" (the module, on batches), "acting" (the module, on rollouts).
        options: Keywords of the module, given a model to refer to: what its promises hold under.
        variants: Further keywords by name, under which its gradient is as independent.
        variant_batches: What makes the batches of some of the variants.
        slow_variants: Those of which `make slow` alone proves it.
        batches: Further makers of batches by name, of which the same holds under its own options.
        orders: Orders of the rows that change nothing.
        sizes: Rows of the micro-batches that one batch is cut into.
        first: Numbers that the first optimizer step logs, exactly, with `first_options`, of a policy changed by
            `first_policy`, on a batch without the keys `first_without`.
        outputs: Numbers that the policy gives a token; None: one for each token of the vocabulary.
        source: Which of `SOURCES` its recipe reads.
        needs: Keywords without which it cannot be built, as a configuration names them (`tests/workplace.py`).
        recipe: Options that make its recipe short, and those that it needs to log all of its metrics.
        resume: The runs that are killed.
    """

    batch: Callable[..., Batch]
    nothing: Mapping[str, Callable[[Batch, int], None]]
    source: str
    kind: str = "automatic"
    options: Callable[[nn.Module], dict[str, Any]] = lambda other: {}
    variants: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    variant_batches: Mapping[str, Callable[..., Batch]] = field(default_factory=dict)
    slow_variants: Collection[str] = ()
    batches: Mapping[str, Callable[..., Batch]] = field(default_factory=dict)
    orders: Sequence[Sequence[int]] = ((5, 1, 7, 0, 2, 6, 3, 4), (7, 6, 5, 4, 3, 2, 1, 0))
    sizes: Sequence[Sequence[int]] = ((4, 4), (1, 7), (3, 3, 2), (1, 5, 2), (1,) * 8)
    first: Mapping[str, Any] = field(default_factory=dict)
    first_without: Sequence[str] = ()
    first_options: Mapping[str, Any] = field(default_factory=dict)
    first_policy: Callable[[nn.Module], nn.Module] = lambda policy: policy
    outputs: int | None = None
    needs: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    resume: Resume = Resume(("--trainer.max_epochs", "3", "--trainer.accumulate_grad_batches", "2"))

    def cuts(self) -> list[Sequence[int]]:
        """Those of `sizes` that differ: a module that cuts its batches itself goes by the first number alone."""
        return list({tuple(sizes) if self.kind == "automatic" else sizes[0]: sizes for sizes in self.sizes}.values())
