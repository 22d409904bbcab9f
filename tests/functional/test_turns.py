"""Returns of turns: against hand-made numbers, and where they are the rewards of whole episodes."""

import pytest
import torch

from alignment_modules.functional import over_turns, turn_returns, turn_sums

MASK = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
GIVEN = torch.tensor([[0, 1.0, 9, 2, 9, 0, 4], [9, 0, 3.0, 9, 0, 9, 9], [9.0] * 7])
NAN = float("nan")


def test_what_is_still_to_come_by_hand():
    # the first episode has 0.5 beside its turns' 1, 2, 4; the second lost 1 beside its 3
    found = turn_returns(torch.tensor([7.5, 2.0, 5.0]), GIVEN, MASK)
    expected = torch.tensor([[7.5, 6.5, 4.5], [2.0, -1.0, NAN], [NAN, NAN, NAN]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


def test_a_penalty_is_taken_from_the_turns_up_to_it():
    penalty = torch.where(MASK.bool(), torch.arange(7.0), NAN)
    found = turn_returns(torch.zeros(3), torch.zeros(3, 7), MASK, penalty)
    expected = torch.tensor([[-15.0, -14.0, -11.0], [-7.0, -4.0, NAN], [NAN, NAN, NAN]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


def test_a_reward_that_does_not_apply_has_no_returns():
    found = turn_returns(torch.tensor([NAN, 1.0, 1.0]), GIVEN, MASK)
    assert found[0].isnan().all()
    assert found[1, 0] == 1.0


def test_from_tokens_to_turns_and_back():
    sums = turn_sums(torch.ones(3, 7), MASK)
    assert sums.tolist() == [[2, 1, 2], [2, 1, 0], [0, 0, 0]]
    back = over_turns(torch.tensor([[10.0, 20, 30], [40, 50, NAN], [NAN, NAN, NAN]]), MASK)
    assert back.tolist() == [[10, 10, 0, 20, 0, 30, 30], [0, 40, 40, 0, 50, 0, 0], [0] * 7]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 4)])
def test_nothing_at_all(shape):
    nothing = torch.zeros(shape)
    found = turn_returns(torch.zeros(shape[0]), nothing, nothing)
    assert found.shape == (shape[0], 0)
    assert over_turns(found, nothing).shape == shape


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="turn_rewards"):
        turn_returns(torch.zeros(3), torch.zeros(3, 6), MASK)
    with pytest.raises(ValueError, match="rewards"):
        turn_returns(torch.zeros(2), GIVEN, MASK)
    with pytest.raises(ValueError, match="penalty"):
        turn_returns(torch.zeros(3), GIVEN, MASK, torch.zeros(2, 7))
