"""The order of a mixture: shares in every batch, passes over the sources, and where it is taken up."""

import itertools

import numpy as np
import pytest

from datamodules.orders import UniformOrder
from datamodules.orders.mixture import MixtureOrder


def make(sizes=(10, 5, 4), shares=(3, 2, 1), rows=19, batch_size=4, **options):
    return MixtureOrder(sizes, shares, rows, batch_size=batch_size, **options)


def walked(order, epochs, sizes):
    """The rows of each source in the order in which they came."""
    rows = np.concatenate([batch for epoch in range(epochs) for batch in order.batches(epoch)])
    starts = [0, *itertools.accumulate(sizes)]
    return [(rows[(rows >= a) & (rows < b)] - a).tolist() for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("rows", "replicas"), [(7, 2), (13, 3), (14, 3), (12, 3), (2, 4), (1, 3)])
def test_one_source_comes_as_without_a_mixture(rows, replicas, shuffle, drop_last):
    options = {"batch_size": 2, "num_replicas": replicas, "shuffle": shuffle, "seed": 3, "drop_last": drop_last}
    if drop_last and rows < 2 * replicas:
        return
    plain, mixed = UniformOrder(rows, **options), MixtureOrder([rows], [5], rows, **options)
    for epoch in (0, 1, 4):
        assert plain.length(epoch) == mixed.length(epoch)
        for one, other in zip(plain.batches(epoch), mixed.batches(epoch), strict=True):
            assert one.tolist() == other.tolist()


def test_every_batch_holds_the_shares():
    order, starts, seen = make(rows=1000, batch_size=12), [0, 10, 15, 19], np.zeros(3)
    for epoch in range(3):
        for batch in order.batches(epoch):
            seen += [np.sum((batch >= a) & (batch < b)) for a, b in itertools.pairwise(starts)]
            assert np.abs(seen - seen.sum() * np.array([3, 2, 1]) / 6).max() < 1
    assert seen.sum() == 3000


def test_every_source_is_walked_through_pass_by_pass_across_epochs():
    for rows, size in zip(walked(make(), 12, (10, 5, 4)), (10, 5, 4), strict=True):
        passes = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
        assert len(passes) > 5
        assert all(sorted(one) == list(range(size)) for one in passes)
        assert len(set(map(tuple, passes))) > 1


def test_without_shuffling_each_source_keeps_its_order():
    for rows, size in zip(walked(make(shuffle=False), 4, (10, 5, 4)), (10, 5, 4), strict=True):
        assert rows == [number % size for number in range(len(rows))]


def test_two_sources_of_one_length_come_in_different_orders():
    first, second = walked(make((50, 50), (1, 1), 100), 1, (50, 50))
    assert sorted(first) == sorted(second) != first
    assert first != second


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("replicas", [1, 3])
def test_an_epoch_is_taken_up_at_any_batch(replicas, shuffle):
    whole = make(num_replicas=replicas, batch_size=2, shuffle=shuffle)
    for epoch in range(4):
        expected = [batch.tolist() for batch in whole.batches(epoch)]
        for start in range(len(expected) + 1):
            fresh = make(num_replicas=replicas, batch_size=2, shuffle=shuffle)
            assert [batch.tolist() for batch in fresh.batches(epoch, start)] == expected[start:]


def test_ranks_share_out_the_batches_of_one_process():
    one, many = make(batch_size=6), make(batch_size=2, num_replicas=3)
    for epoch in range(3):
        batches = zip(one.batches(epoch), many.batches(epoch), strict=True)
        for number, (together, dealt) in enumerate(batches):
            if len(together) >= 3:
                assert together.tolist() == dealt.tolist()
            else:  # a last batch of one row for three ranks: those that come twice are the epoch's first
                assert number == one.length(epoch) - 1
                assert together.tolist() == dealt.tolist()[: len(together)]


def test_every_rank_gets_some_of_each_source():
    order = make((1000, 1000), (1, 1), 2000, batch_size=8, num_replicas=2)
    per_rank = np.zeros((2, 2))
    for batch in order.batches(0):
        for rank in range(2):
            own = batch[rank::2]
            per_rank[rank] += [np.sum(own < 1000), np.sum(own >= 1000)]
    assert per_rank.min() > 400


def test_what_resumes_and_what_does_not():
    order = make(batch_size=4)
    assert not order.differences(make(batch_size=2, num_replicas=2).settings())
    assert order.differences(make(shares=(1, 1, 1)).settings()) == {"shares": [3, 2, 1]}
    assert order.differences(make(sizes=(10, 5, 3)).settings()) == {"sizes": [10, 5, 4]}
    assert order.differences(make(rows=20).settings()) == {"num_rows": 19}


def test_drop_last_leaves_out_what_is_not_full():
    order = make(drop_last=True)
    assert [len(batch) for batch in order.batches(1)] == [4] * 4
    with pytest.raises(ValueError, match="drop_last=True leaves nothing: 3 rows"):
        make(rows=3, drop_last=True)
