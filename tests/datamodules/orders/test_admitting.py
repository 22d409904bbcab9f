"""Rows that are not admitted give their places to others; what is admitted grows, or follows recorded scores."""

import copy
import itertools

import numpy as np
import pytest

from datamodules.orders import UniformOrder
from datamodules.orders.admitting import Pace, RampOrder, SuccessOrder
from datamodules.orders.planned import PlannedOrder
from datamodules.orders.plans import bucketed

ROWS = 40
LENGTHS = np.arange(1, ROWS + 1)
VALUES = np.random.default_rng(0).permutation(ROWS) * 1.0


def ramp(order=None, start=0.25, steps=20, accumulate=1, updates=1, **options):
    order = UniformOrder(ROWS, batch_size=4) if order is None else order
    pace = Pace(order.length(0), accumulate, updates)
    given = {"start": start, "steps": steps, "pace": pace, "seed": 0, "description": "d"}
    return RampOrder(order, LENGTHS, options.pop("values", VALUES), **(given | options))


def test_only_admitted_rows_come_and_their_share_grows():
    order, seen = ramp(), []
    for epoch in range(2):
        for number, batch in enumerate(order.batches(epoch)):
            step = epoch * 10 + number
            count = int(np.ceil((0.25 + 0.75 * step / 20) * ROWS))
            assert (VALUES[batch] < count).all()
            assert len(set(batch.tolist())) == 4
            seen.append(VALUES[batch].max())
    assert max(seen[:5]) < 20 < max(seen[15:])


def test_each_admitted_row_comes_and_in_the_end_all_do_once():
    order = ramp(steps=30)
    epoch = np.concatenate(list(order.batches(0)))
    assert set(np.flatnonzero(VALUES < 10)) <= set(epoch.tolist())
    plain = UniformOrder(ROWS, batch_size=4)
    assert all(map(np.array_equal, order.batches(3), plain.batches(3)))
    assert not all(map(np.array_equal, order.batches(2), plain.batches(2)))


def test_steps_are_those_of_the_optimizer():
    counts = {}
    for name, options in {"plain": {}, "accumulated": {"accumulate": 3}, "updates": {"updates": 2}}.items():
        order = ramp(**options)
        counts[name] = [int(order.admitted(1, batch).sum()) for batch in range(10)]
    assert counts["plain"] == [int(np.ceil(40 * (0.25 + 0.75 * step / 20))) for step in range(10, 20)]
    # 10 batches an epoch are 4 steps, of 3, 3, 3 and 1
    assert counts["accumulated"] == [int(np.ceil(40 * (0.25 + 0.75 * (4 + batch // 3) / 20))) for batch in range(10)]
    assert counts["updates"] == [40] * 10


def test_ties_are_drawn_once():
    orders = [ramp(values=np.zeros(ROWS), seed=seed) for seed in (0, 0, 1)]
    first, again, other = (order.admitted(0, 0) for order in orders)
    assert first.tolist() == again.tolist() != other.tolist()
    assert (orders[0].admitted(0, 5) >= first).all()


@pytest.mark.parametrize("start", [0, 3, 9])
def test_an_epoch_is_taken_up_at_any_batch(start):
    order = ramp()
    rest = list(order.batches(1))[start:]
    assert all(map(np.array_equal, rest, ramp().batches(1, start)))


def test_a_budget_holds():
    plain = PlannedOrder(bucketed(LENGTHS, 80, 2), max_tokens=80, num_replicas=2)
    order = ramp(plain, values=-LENGTHS * 1.0, start=0.5)  # the longest first
    for epoch in range(3):
        for batch in order.batches(epoch):
            assert all(len(rows) * LENGTHS[rows].max() <= 80 for rows in (batch[::2], batch[1::2]))
            assert len(set(batch.tolist())) == len(batch)


def test_too_few_rows_at_first():
    with pytest.raises(ValueError, match=r"start=0.05 admits 2 of 40 rows, fewer than the 4 of a batch"):
        ramp(start=0.05)
    ramp(UniformOrder(3, batch_size=4), start=0.99, values=np.zeros(3))


def test_what_forbids_to_resume():
    then = ramp().settings()
    assert ramp().differences(then) == {}
    assert set(ramp(accumulate=2).differences(then)) == {"curriculum"}
    assert set(ramp(description="e").differences(then)) == {"curriculum"}
    assert set(UniformOrder(ROWS, batch_size=4).differences(then)) == {"curriculum"}
    assert set(ramp().differences(UniformOrder(ROWS, batch_size=4).settings())) == {"curriculum"}
    assert ramp(UniformOrder(ROWS, batch_size=2, num_replicas=2)).differences(then) == {}


def success(ahead=0, rows=ROWS, batch_size=4, **options):
    given = {"low": 0.1, "high": 0.9, "decay": 0.5, "revisit": 0.2, "seed": 0, "description": "d"} | options
    order = SuccessOrder(UniformOrder(rows, batch_size=batch_size), np.ones(rows, int), **given)
    order.ahead = ahead
    return order


def score(row, number):
    """Of a batch counted through all epochs: a third is always solved, a third never, the rest now and then."""
    return (1.0, 0.0, 0.25 + ((row * 7 + number * number) % 5) / 8)[row % 3]


def flighty(ahead):
    """Prompts are set aside and come back again and again."""
    return success(ahead, low=0.3, high=0.7, decay=0.2)


class Training:
    """Draws `ahead` batches before the one that is trained on, as a loader does for its workers."""

    def __init__(self, order, epoch=0, start=0):
        self.order, self.epoch, self.start, self.seen, self.told = order, epoch, start, [], []

    def step(self, drawn, number):
        batch = drawn.pop(0)
        self.seen.append(batch.tolist())
        scores = [score(row, self.epoch * 10 + number) for row in batch.tolist()]
        self.told.append(self.order.record(batch.tolist(), scores, self.epoch, number))

    def run(self, steps):
        while len(self.seen) < steps:
            drawing = self.order.batches(self.epoch, self.start)
            drawn = list(itertools.islice(drawing, self.order.ahead))
            for number in range(self.start, self.order.length(self.epoch)):
                drawn += itertools.islice(drawing, 1)
                self.step(drawn, number)
                if len(self.seen) == steps:
                    return self
            self.epoch, self.start = self.epoch + 1, 0
        return self


def test_rows_that_are_solved_or_hopeless_are_set_aside_and_come_back():
    training = Training(success()).run(60)
    early, late = np.concatenate(training.seen[:10]), np.concatenate(training.seen[30:])
    assert np.mean(early % 3 == 2) < 0.45
    assert np.mean(late % 3 == 2) > 0.7
    assert set(late[late % 3 != 2].tolist())  # a share is tried again
    assert all(len(set(batch)) == 4 for batch in training.seen)
    assert training.told[-1]["set_aside"] == pytest.approx(26 / 40, abs=0.15)
    assert 0 < training.told[-1]["mean_score"] < 1


def test_the_mean():
    order = success(decay=0.75)
    assert order.record([1, 1, 2], [1.0, 0.0, 1.0], 0, 0)["mean_score"] == pytest.approx(0.75)
    assert order.record([1], [1.0], 0, 1)["mean_score"] == pytest.approx((0.75 * 0.5 + 0.25 + 1.0) / 2)
    assert not order.admitted(0, 2)[2]
    assert order.admitted(0, 2)[[0, 1, 3]].all()
    assert success().record([], [], 0, 0) == {}


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_a_batch_is_drawn_from_what_was_recorded_long_enough_before(ahead):
    order = success(ahead)
    next(iter(order.batches(0)))
    order.record([5], [1.0], 0, 2)
    assert order.admitted(0, 2 + ahead)[5]
    assert not order.admitted(0, 3 + ahead)[5]


def test_where_all_are_set_aside_all_stay():
    order = success()
    order.record(list(range(ROWS)), [1.0] * ROWS, 0, 0)
    plain = UniformOrder(ROWS, batch_size=4)
    assert all(map(np.array_equal, order.batches(0, 1), plain.batches(0, 1)))


@pytest.mark.parametrize("ahead", [0, 1, 4])
@pytest.mark.parametrize("at", [1, 7, 10, 23, 30])
def test_a_run_goes_on_exactly(ahead, at):
    whole = Training(flighty(ahead)).run(45)
    killed = Training(flighty(ahead)).run(at)
    state, (epoch, number) = copy.deepcopy(killed.order.state_dict()), divmod(at, 10)
    for earlier in range(2):  # the batch of the last step comes again where that was under way
        if number >= earlier:
            order = flighty(ahead)
            order.load_state_dict(state, epoch, number - earlier)
            resumed = Training(order, epoch, number - earlier).run(45 - at + earlier)
            assert resumed.seen == whole.seen[at - earlier :]
            assert resumed.told == whole.told[at - earlier :]
    if number == 0:  # the end of an epoch, as the loader tells it
        order = flighty(ahead)
        order.load_state_dict(state, epoch - 1, 10)
        assert Training(order, epoch - 1, 10).run(45 - at).seen == whole.seen[at:]


def test_as_many_are_drawn_in_advance_as_were():
    state = Training(success(2)).run(13).order.state_dict()
    fewer = success(0)
    fewer.load_state_dict(state, 1, 3)
    assert fewer.ahead == 2
    with pytest.raises(ValueError, match=r"drawn 2 in advance .* 4 in advance now"):
        success(4).load_state_dict(state, 1, 3)


def test_an_epoch_begun_anew_is_drawn_from_what_is_known():
    order = success()
    Training(order).run(15)
    first = [batch.tolist() for batch in order.batches(1)]
    assert [batch.tolist() for batch in order.batches(1)] == first
