"""What an optimizer step counts, without a Trainer."""

import pytest
import torch

from alignment_modules.training.objective import Objective, Term
from alignment_modules.training.window import Window


def alone(values, how):
    return values


def of(total, weight):
    return Objective.of(torch.tensor(total), torch.tensor(weight))


@pytest.mark.parametrize("cuts", [[[0, 1, 2]], [[0], [1, 2]], [[2], [0], [1]]])
def test_the_gradient_is_that_of_the_mean_over_all_units(cuts):
    x, weights = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), torch.tensor([1.0, 0.0, 3.0])
    window = Window()
    for rows in cuts:
        part = weights[rows]
        window.add(Objective.of((part * x[rows] ** 2).sum(), part.sum())).backward()
    closed = window.close(alone)
    torch.testing.assert_close(x.grad / closed.divisor, 2 * x.detach() * weights / 4)
    assert closed.loss == pytest.approx(28 / 4)


def test_ranks_are_added_up_and_the_window_is_new_afterwards():
    window = Window()
    window.tokens = 5
    window.add(of(6.0, 2.0))
    closed = window.close(lambda values, how: {"sum": 2 * values}[how])
    assert (closed.loss, closed.divisor, window.num_tokens) == (3.0, 4.0, 10.0)
    window.add(of(1.0, 1.0))
    closed = window.close(alone)
    assert (closed.loss, closed.divisor, window.num_tokens) == (1.0, 1.0, 10.0)


def test_a_step_without_units_is_empty_and_counted():
    window = Window()
    window.learnt = None
    window.add(of(0.0, 0.0))
    assert window.close(alone).empty
    assert (window.skipped, window.learnt) == (1, False)
    window.add(of(0.0, 0.0))
    assert not window.close(lambda values, how: values + 1).empty  # another rank has some
    window.add(of(1.0, 2.0))
    assert not window.close(alone).empty
    assert (window.skipped, window.learnt) == (1, True)


def test_a_reset_forgets_the_open_step_alone():
    window = Window()
    window.tokens = 3
    window.add(of(6.0, 2.0))
    window.close(alone)
    window.tokens = 9
    window.add(of(5.0, 5.0))
    window.reset()
    window.add(of(1.0, 4.0))
    closed = window.close(alone)
    assert (closed.loss, closed.divisor, window.num_tokens) == (0.25, 4.0, 3.0)


def several(x, tokens, pairs):
    terms = {"nll": Term((x * tokens).sum(), tokens.sum(), 0.5), "ratio": Term((x**2 * pairs).sum(), pairs.sum())}
    return Objective(terms)


@pytest.mark.parametrize("cuts", [[[0, 1, 2]], [[0], [1, 2]], [[2], [0], [1]]])
def test_terms_are_divided_by_their_own_units(cuts):
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    tokens, pairs = torch.tensor([2.0, 5.0, 1.0]), torch.tensor([1.0, 0.0, 1.0])
    window = Window()
    window.open({"nll": tokens.sum(), "ratio": pairs.sum()})
    for rows in cuts:
        window.add(several(x[rows], tokens[rows], pairs[rows])).backward()
    closed = window.close(alone)
    torch.testing.assert_close(x.grad / closed.divisor, 0.5 * tokens / 8 + 2 * x.detach() * pairs / 2)
    assert closed.loss == pytest.approx(0.5 * 15 / 8 + 10 / 2)


def test_several_terms_whose_units_are_unknown_or_wrong_are_refused():
    one = torch.ones(3)
    with pytest.raises(ValueError, match=r"terms nll, ratio, each with a unit.*units\(piece\)"):
        Window().add(several(one, one, one))
    with pytest.raises(ValueError, match="terms nll, ratio, each with a unit"):
        _ = several(one, one, one).total
    window = Window()
    window.open({"nll": torch.tensor(3.0), "ratio": torch.tensor(2.0)})
    window.add(several(one, one, one))
    with pytest.raises(ValueError, match=r"nll: 3 and then 3, ratio: 2 and then 3"):
        window.close(alone)
    window.open({"nll": torch.tensor(3.0)})
    with pytest.raises(ValueError, match="terms nll, ratio; expected are nll"):
        window.add(several(one, one, one))


def test_an_objective_of_one_term_is_its_sum_times_its_coefficient():
    objective = Objective({"loss": Term(torch.tensor(6.0), torch.tensor(3.0), 0.5)})
    assert (objective.total, objective.weight) == (3.0, 3.0)
    assert Window().add(objective) == 3.0
