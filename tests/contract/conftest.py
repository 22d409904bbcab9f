"""What the promises need: modules by their row in the table, and the change of the weights that a step makes."""

import copy

import pytest

from tests.models import other_than
from tests.paradigms import build, headed
from tests.workplace import align, workplace  # noqa: F401


@pytest.fixture
def make(tiny_llama):
    """`make(name, policy=..., **options)`: builds that paradigm's module, each time on a fresh copy of the policy."""

    def factory(name, policy=None, **options):
        policy = headed(name, tiny_llama if policy is None else policy)
        other = other_than(policy)
        return lambda **more: build(name, copy.deepcopy(policy), other=copy.deepcopy(other), **(options | more))

    return factory


@pytest.fixture
def cut_update(make, update):
    """The update of a step over rows, cut into micro-batches of these sizes, whoever cuts them.

    Lightning accumulates the batches of a loader; a module that takes its own steps cuts one batch itself, each piece
    as large as the first size says.
    """

    def change(name, batch_of, sizes, **options):
        rows = list(range(8))
        factory = make(name, **options)
        if not factory().automatic_optimization:
            return update(make(name, **(options | {"micro_batch_size": sizes[0]})), [batch_of(rows)])
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        parts = [rows[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        return update(factory, [batch_of(part) for part in parts])

    return change
