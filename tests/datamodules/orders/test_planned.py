"""Batches of a plan: every row once, the budget held on every rank, the same count in every epoch, drawn anew."""

import itertools

import numpy as np
import pytest

from datamodules.orders import UniformOrder
from datamodules.orders.planned import PlannedOrder
from datamodules.orders.plans import ascending, bucketed

MANY = np.clip(np.random.default_rng(0).lognormal(3, 0.8, 5000).astype(int), 1, 200)
LENGTHS = MANY[:500]


def budget(max_tokens=400, replicas=1, lengths=LENGTHS, **options):
    plan = bucketed(lengths, max_tokens, replicas)
    return PlannedOrder(plan, max_tokens=max_tokens, num_replicas=replicas, **options)


def padded(rows):
    return len(rows) * int(MANY[rows].max())


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [200, 401, 5000, 10**6])
def test_every_row_once_within_the_budget(max_tokens, replicas):
    order = budget(max_tokens, replicas)
    for epoch in range(3):
        batches = list(order.batches(epoch))
        assert len(batches) == order.length(epoch)
        assert sorted(itertools.chain(*batches)) == list(range(500))
        for batch in batches:
            dealt = [batch[rank::replicas] for rank in range(replicas)]
            assert all(len(rows) and padded(rows) <= max_tokens for rows in dealt)
            assert max(LENGTHS[batch]) <= order.room(len(batch))


def test_little_padding():
    batches = list(budget(2000, lengths=MANY).batches(0))
    assert 1 - MANY.sum() / sum(map(padded, batches)) < 0.1
    rows = np.random.default_rng(1).permutation(5000)
    assert 1 - MANY.sum() / sum(padded(rows[i : i + 60]) for i in range(0, 5000, 60)) > 0.6  # of batches of one size


def test_epochs_put_other_rows_together_and_depend_on_the_seed():
    def pairs(order, epoch):
        return {pair for batch in order.batches(epoch) for pair in itertools.combinations(sorted(batch.tolist()), 2)}

    order, seeded = budget(lengths=MANY), pairs(budget(lengths=MANY, seed=1), 0)
    first, again, other = pairs(order, 0), pairs(order, 0), pairs(order, 1)
    assert first == again
    assert len(first & other) < 0.3 * len(first)
    assert first != seeded
    lengths = [int(LENGTHS[batch].max()) for batch in budget().batches(0)]
    assert lengths != sorted(lengths)
    assert lengths != [int(LENGTHS[batch].max()) for batch in budget().batches(1)]


@pytest.mark.parametrize("start", [0, 1, 7])
def test_an_epoch_is_taken_up_at_any_batch(start):
    order = budget()
    rest = list(order.batches(2))[start:]
    assert all(map(np.array_equal, rest, order.batches(2, start)))
    assert len(rest) == order.length(2) - start
    assert list(order.batches(2, order.length(2))) == []


def test_fewer_rows_than_ranks():
    order = budget(10, 3, np.array([5, 5]))
    [batch] = order.batches(0)
    assert sorted(set(batch.tolist())) == [0, 1]
    assert len(batch) == 3


def test_sorted_batches():
    values = np.arange(500) % 7 * 1.0
    order = PlannedOrder(ascending(values, LENGTHS, None, 8), batch_size=8, shuffle_batches=False)
    first, second = (np.concatenate(list(order.batches(epoch))) for epoch in (0, 1))
    assert sorted(first.tolist()) == list(range(500))
    assert (np.diff(values[first]) >= 0).all()
    assert (np.diff(values[second]) >= 0).all()
    assert first.tolist() != second.tolist()
    assert [len(batch) for batch in order.batches(0)] == [8] * 62 + [4]


@pytest.mark.parametrize("replicas", [1, 2])
def test_sorted_batches_within_a_budget(replicas):
    plan = ascending(LENGTHS.astype(float), LENGTHS, 400, 8, replicas)
    order = PlannedOrder(plan, max_tokens=400, num_replicas=replicas, shuffle_batches=False)
    batches = list(order.batches(0))
    assert sorted(itertools.chain(*batches)) == list(range(500))
    assert (np.diff(LENGTHS[np.concatenate(batches)]) >= 0).all()
    for batch, after in itertools.pairwise(batches):
        assert all(padded(batch[rank::replicas]) <= 400 for rank in range(replicas))
        more = np.append(batch, after[:1])  # one row more is one too many
        assert -(-len(more) // replicas) * LENGTHS[more].max() > 400
    assert [len(batch) for batch in order.batches(5)] == [len(batch) for batch in batches]


def test_what_forbids_to_resume():
    then = budget().settings()
    assert budget().differences(then) == {}
    assert budget(401).differences(then) == {"max_tokens": 401}
    assert budget(replicas=2).differences(then) == {"world_size": 2}
    assert budget(seed=3).differences(then) == {"seed": 3}
    uniform = UniformOrder(500, batch_size=8)
    assert uniform.differences(then) == {"max_tokens": None, "batch_size": 8}
    assert set(budget().differences(uniform.settings())) == {"max_tokens", "batch_size"}
    values = LENGTHS.astype(float)

    def rising(size, replicas, curriculum="by length"):
        plan = ascending(values, LENGTHS, None, size, replicas)
        options = {"batch_size": size, "num_replicas": replicas, "curriculum": curriculum}
        return PlannedOrder(plan, **options, shuffle_batches=False)

    assert rising(4, 2).differences(rising(8, 1).settings()) == {}
    assert rising(8, 1, "other").differences(rising(8, 1).settings()) == {"curriculum": "other"}
    assert "world_size" in rising(4, 1).differences(rising(8, 2).settings())
    assert uniform.differences(rising(8, 1).settings()) == {"curriculum": None}
