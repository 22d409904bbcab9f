"""What is told of each source: split by rows, added up over ranks that have others, kept in checkpoints."""

import pytest
import torch

from alignment_modules.functional.sources import PRESENT, by_source
from alignment_modules.functional.statistics import RowSums, Statistic
from alignment_modules.training.meters import Meters
from alignment_modules.training.objective import Objective, Term
from alignment_modules.training.sources import of_sources, weigh_units

SUMS = {"loss": RowSums(torch.tensor([1.0, 2.0, 6.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 0.0]))}


def filled(*batches):
    meters = Meters()
    for statistics in batches:
        meters.update(statistics)
    return meters


def on_ranks(*ranks):
    """Every rank's numbers, each reduced with all others."""
    names = [{name: len(value) for (_, name), value in meters._values.items()} for meters in ranks]
    given = []
    for meters in ranks:
        meters.compute(lambda values, how: given.append(values) or values, lambda own: names)
    total = torch.stack(given).sum(dim=0)
    return [meters.compute(lambda values, how: total, lambda own: names) for meters in ranks]


def test_means_are_of_a_sources_rows():
    found = by_source(SUMS, ["b", "a", "b", "b"])
    assert filled(found).compute(lambda values, how: values) == {"a/loss": 1.0, "b/loss": 11 / 4}
    assert by_source(SUMS, None) == {}


def test_several_rows_beside_each_other_are_of_one_source():
    found = by_source(SUMS, ["b", "a"])
    assert filled(found).compute(lambda values, how: values) == {"b/loss": 1.0, "a/loss": 10 / 3}
    with pytest.raises(ValueError, match="'loss' is told of 4 rows, and the batch has 3"):
        by_source(SUMS, ["a", "b", "c"])


def test_what_is_not_a_number_stays_in_its_source():
    sums = {"loss": RowSums(torch.tensor([torch.nan, 2.0]), torch.ones(2))}
    found = filled(by_source(sums, ["bad", "good"])).compute(lambda values, how: values)
    assert found["good/loss"] == 2.0
    assert found["bad/loss"] != found["bad/loss"]


def test_ranks_need_not_have_the_same_sources():
    one, two = by_source(SUMS, ["a", "a", "b", "b"]), by_source(SUMS, ["b", "b", "c", "c"])
    nothing = by_source({"loss": RowSums(torch.zeros(0), torch.zeros(0))}, [])
    wanted = {"a/loss": 1.0, "b/loss": 13 / 6, "c/loss": 10 / 3}
    assert on_ranks(filled(one), filled(two), filled(nothing)) == [wanted] * 3


def test_sources_without_units_are_left_out():
    sums = {"accuracy": RowSums(torch.zeros(2), torch.tensor([0.0, 2.0]))}
    assert filled(by_source(sums, ["a", "b"])).compute(lambda values, how: values) == {"b/accuracy": 0.0}


def test_a_checkpoint_keeps_them():
    meters, other = filled(by_source(SUMS, ["a", "a", "b", "b"])), Meters()
    other.load_state_dict(meters.state_dict(), torch.device("cpu"))
    more = by_source(SUMS, ["c", "c", "b", "b"])
    meters.update(more)
    other.update(more)
    assert other.of_sources
    assert other.compute(lambda values, how: values) == meters.compute(lambda values, how: values)


def test_a_source_may_not_take_anothers_name():
    meters = filled(by_source(SUMS, ["critic"] * 4), {"critic/loss": Statistic(torch.tensor(1.0))})
    with pytest.raises(ValueError, match=r"a source of the data is called 'critic'.*'critic/loss'"):
        meters.compute(lambda values, how: values)


def test_terms_with_units_of_their_own_are_weighed_and_told_of_together():
    rows = torch.tensor([1.0, 3.0], requires_grad=True)
    terms = {"nll": Term.of_rows(rows * 2, torch.tensor([2.0, 1.0])), "ratio": Term.of_rows(rows, torch.ones(2), 0.5)}
    terms["router"] = Term(rows.sum(), torch.tensor(7.0))
    batch = {"source_name": ["a", "b"], "source_weights": torch.tensor([3.0, 1.0])}
    found = of_sources(Objective(terms, {"loss": Statistic(torch.tensor(0.0))}), batch)
    assert found.terms["nll"][:2] == (torch.tensor(12.0), torch.tensor(7.0))
    assert found.terms["ratio"][:3] == (torch.tensor(6.0), torch.tensor(4.0), 0.5)
    assert found.terms["router"] is terms["router"]  # of no rows
    metrics = filled(found.statistics).compute(lambda values, how: values)
    assert metrics["loss"] == pytest.approx(12 / 7 + 0.5 * 6 / 4 + 4 / 7)
    assert (metrics["a/loss"], metrics["b/loss"]) == (1.0 + 0.5, 6.0 + 1.5)
    units = {"nll": torch.tensor([2, 1]), "ratio": torch.ones(2).bool(), "router": torch.tensor(7)}
    assert {name: float(count) for name, count in weigh_units(units, batch).items()} == {
        "nll": 7.0,
        "ratio": 4.0,
        "router": 7.0,
    }


def test_an_objective_that_does_not_tell_its_rows():
    objective = Objective.of(torch.tensor(2.0), torch.tensor(1.0), {"loss": Statistic(torch.tensor(2.0))})
    named = of_sources(objective, {"source_name": ["a", "b"]})
    assert named.statistics.keys() == {"loss", PRESENT}
    with pytest.raises(ValueError, match=r"does not tell what each row adds.*Objective\.of_rows"):
        of_sources(objective, {"source_weights": torch.ones(2)})
    with pytest.raises(ValueError, match=r"units\(piece\) does not count by row"):
        weigh_units({"loss": torch.tensor(1.0)}, {"source_weights": torch.ones(2)})
    rows = Objective.of_rows(torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="`source_weights` has 3 weights for 4 rows"):
        of_sources(rows, {"source_weights": torch.ones(3)})
