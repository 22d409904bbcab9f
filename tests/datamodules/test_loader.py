import itertools

import numpy as np
import pytest
import torch

from datamodules.batching import Table
from datamodules.loader import EvaluationSampler, ResumableLoader
from datamodules.orders import UniformOrder


class Numbers(Table):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def row(self, index):
        return index


def make(size=23, batch_size=3, workers=0, rank=0, **options):
    order = UniformOrder(size, batch_size=batch_size, **options)
    kept = {"num_workers": workers, "persistent_workers": workers > 0}
    return ResumableLoader(Numbers(size), order, rank=rank, collate_fn=list, **kept)


def epoch(loader, number):
    loader.sampler.set_epoch(number)
    return list(loader)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [(0, 3), (1, 1), (1, 5), (2, 0)])
def test_rebuilt_loader_gives_exactly_the_rest(workers, at):
    whole = make(workers=workers)
    expected = [epoch(whole, e) for e in range(4)]
    assert [len(e) for e in expected] == [8] * 4
    killed = make(workers=workers)
    for number in range(at[0]):
        epoch(killed, number)
    killed.sampler.set_epoch(at[0])
    iterator = iter(killed)
    seen = list(itertools.islice(iterator, at[1]))
    state = killed.state_dict()
    del iterator, killed
    assert (state["epoch"], state["batches_seen"]) == at

    resumed = make(workers=workers)
    resumed.load_state_dict(state)
    rest = epoch(resumed, at[0])
    assert seen + rest == expected[at[0]]
    assert epoch(resumed, at[0] + 1) == expected[at[0] + 1]  # the offset does not stick
    assert len(resumed) == 8


def test_state_after_the_last_batch_has_nothing_left_of_its_epoch():
    loader = make()
    epoch(loader, 0)
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    assert epoch(resumed, 0) == []
    assert resumed.state_dict() == loader.state_dict()
    assert epoch(resumed, 1) == epoch(make(), 1)


def test_an_abandoned_epoch_starts_anew():
    loader = make()
    first = epoch(loader, 0)
    next(iter(loader))
    assert list(loader) == first


def test_a_batch_in_flight_is_given_again():
    loader = make()
    iterator = iter(loader)
    first, second = next(iterator), next(iterator)
    loader.in_flight = lambda: 1
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    assert next(iter(resumed)) == second != first


def test_order_depends_on_seed_and_epoch_alone():
    assert epoch(make(), 1) == epoch(make(), 1)
    assert epoch(make(), 0) != epoch(make(), 1)
    assert epoch(make(seed=1), 0) != epoch(make(), 0)
    assert epoch(make(seed=1), 0) != epoch(make(), 1)
    in_order = [list(range(i, min(i + 3, 23))) for i in range(0, 23, 3)]
    assert epoch(make(shuffle=False), 0) == epoch(make(shuffle=False), 1) == in_order


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    epoch(make(), 0)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("size", [12, 13, 14, 15, 23])
def test_two_ranks_share_out_the_batches_of_one_process(size):
    one = epoch(make(size, batch_size=6), 1)
    ranks = [epoch(make(size, batch_size=3, num_replicas=2, rank=r), 1) for r in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(one)
    for together, *apart in zip(one, *ranks, strict=True):
        dealt = apart[0] + apart[1]
        assert set(dealt) >= set(together)
        if size % 6 != 1:  # one row for two ranks: repeated, else a rank would have none
            assert sorted(dealt) == sorted(together)
    everything = [i for rank in ranks for batch in rank for i in batch]
    assert set(everything) == set(range(size))


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_zeros_state_resumes_every_rank(rank):
    zero = make(num_replicas=2, rank=0)
    zero.sampler.set_epoch(1)
    iterator = iter(zero)
    next(iterator), next(iterator)
    expected = epoch(make(num_replicas=2, rank=rank), 1)
    other = make(num_replicas=2, rank=rank)
    other.load_state_dict(zero.state_dict())
    assert epoch(other, 1) == expected[2:]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [23, 24])
def test_another_number_of_ranks_takes_up_the_same_batches(size, drop_last):
    def rest(ranks, state):
        loaders = [make(size, 6 // ranks, num_replicas=ranks, rank=rank, drop_last=drop_last) for rank in range(ranks)]
        for loader in loaders:
            loader.load_state_dict(state)
        steps = zip(*(epoch(loader, 1) for loader in loaders), strict=True)
        return [sorted(itertools.chain(*parts)) for parts in steps]

    state = make(size, 3, num_replicas=2, drop_last=drop_last).state_dict() | {"epoch": 1, "batches_seen": 1}
    expected = rest(2, state)
    assert len(expected) == 3 - (drop_last and size == 23)
    assert rest(1, state) == rest(3, state) == expected


def test_a_tail_that_other_ranks_fill_up_is_refused():
    state = make(25, batch_size=6).state_dict()
    with pytest.raises(ValueError, match=r"world_size was 1 .* is 2 now"):
        make(25, batch_size=3, num_replicas=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_replicas": 2}, "world_size was 1 .* is 2 now"),
        ({"batch_size": 4}, "batch_size was 3"),
        ({"size": 24}, "num_rows was 23"),
        ({"seed": 1}, "seed was 0"),
        ({"shuffle": False}, "shuffle was True"),
    ],
)
def test_another_setting_is_refused(change, name):
    with pytest.raises(ValueError, match=f"cannot resume the training data: {name}"):
        make(**change).load_state_dict(make().state_dict())


def test_other_content_is_refused():
    loader, state = make(), make().state_dict()
    loader.dataset.fingerprint = "other"
    with pytest.raises(ValueError, match="fingerprint was ''"):
        loader.load_state_dict(state)


def test_drop_last():
    assert [len(b) for b in epoch(make(drop_last=True), 0)] == [3] * 7
    with pytest.raises(ValueError, match="drop_last=True leaves nothing: 2 rows"):
        make(2, drop_last=True)


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 5, 7, 16, 23])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_deals_every_row_once(replicas, size, batch_size):
    ranks = [
        list(EvaluationSampler(Numbers(size), batch_size=batch_size, num_replicas=replicas, rank=r))
        for r in range(replicas)
    ]
    assert len({len(batches) for batches in ranks}) == 1  # equally many forward passes: no rank waits for ever
    rows = [i for batches in ranks for batch in batches for i in batch]
    assert all(len(batch) >= 1 for batches in ranks for batch in batches)
    assert max(len(batch) for batches in ranks for batch in batches) <= batch_size + (batch_size == 1)
    if size >= replicas:
        assert sorted(rows) == list(range(size))
    else:
        assert set(rows) == set(range(size))


def test_a_dataset_that_takes_one_number_at_a_time():
    loader = ResumableLoader([5, 6, 7, 8], UniformOrder(4, batch_size=2, shuffle=False))
    assert [batch.tolist() for batch in loader] == [[5, 6], [7, 8]]
    assert loader.state_dict()["fingerprint"] == ""


def test_the_order_of_former_versions():
    """Permutations of `numpy.random.default_rng([seed, epoch])`, dealt row by row to the ranks, then cut."""
    for rank, epoch_ in [(0, 0), (1, 3)]:
        order = np.resize(np.random.default_rng([7, epoch_]).permutation(23), 23)[rank::2].tolist()
        loader = make(batch_size=4, num_replicas=2, rank=rank, seed=7)
        assert epoch(loader, epoch_) == [order[i : i + 4] for i in range(0, len(order), 4)]


def test_a_state_of_former_versions():
    state = {"epoch": 1, "batches_seen": 5, "world_size": 1, "batch_size": 3, "num_rows": 23}
    loader = make()
    loader.load_state_dict(state | {"shuffle": True, "seed": 0, "drop_last": False, "fingerprint": ""})
    assert epoch(loader, 1) == epoch(make(), 1)[5:]
