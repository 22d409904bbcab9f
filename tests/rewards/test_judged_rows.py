"""Rows that name their rewards: the others neither see them nor add to their total."""

import pytest
import torch

from alignment_modules.rewards import ExactMatch, RewardError, RewardSet
from alignment_modules.rewards.judged_rows import check_judges, judged_rows


class Length:
    """Remembers what it was asked."""

    name = "length"

    def __init__(self):
        self.seen = []

    def __call__(self, completions, level):
        assert len(completions) == len(level)
        self.seen += completions
        return [float(len(text)) for text in completions]


def test_a_reward_sees_what_it_judges_and_adds_nothing_elsewhere():
    length = Length()
    table = RewardSet([length, ExactMatch()], weights=[0.5, 2.0])(
        prompts=["p", "q", "r"],
        completions=["aa", "b", "cccc", "d", "e", "r"],
        columns={"answer": [None, "d", "r"], "level": [1, 2, 3]},
        judges=[("length",), ["exact_match"], None],
    )
    assert length.seen == ["aa", "b", "e", "r"]
    assert table.values.nan_to_num(-9).tolist() == [[2, -9], [1, -9], [-9, 0], [-9, 1], [1, 0], [1, 1]]
    assert table.total.tolist() == [1.0, 0.5, 0.0, 2.0, 0.5, 2.5]
    assert table.asked.tolist() == [[True, False]] * 2 + [[False, True]] * 2 + [[True, True]] * 2


def test_a_reward_that_judges_nothing_is_not_called():
    def never(completions):
        raise AssertionError

    table = RewardSet([never, ExactMatch()])(
        completions=["a", "b"], columns={"answer": ["a", "a"]}, judges=[("exact_match",)] * 2
    )
    assert table.total.tolist() == [1.0, 0.0]


def test_what_a_reward_does_not_apply_to_has_no_total_though_another_would():
    table = RewardSet([lambda completions: [None] * len(completions), ExactMatch()])(
        completions=["a", "b"], columns={"answer": ["a", "b"]}, judges=[("lambda",), None]
    )
    assert table.total.isnan().tolist() == [True, False]


def test_a_result_of_the_wrong_length_is_counted_by_what_was_judged():
    def four(completions):
        return [0.0] * 4

    with pytest.raises(RewardError, match="'four' returned 4 values for 2 completions"):
        RewardSet([four, ExactMatch()])(
            completions=["a"] * 4,
            columns={"answer": ["a"] * 2},
            prompts=["p", "q"],
            judges=[("four",), ("exact_match",)],
        )


def test_all_judge_all_where_no_row_names_any():
    assert judged_rows(("a", "b"), None, 4) is None
    assert judged_rows(("a", "b"), [None, None], 4) is None
    assert torch.equal(judged_rows(("a", "b"), [None, ("b",)], 2), torch.tensor([[True, True], [False, True]]))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            ("brevity",),
            r"row 1 of a batch \(source 'code'\) is to be judged by 'brevity'.*rewards: length, exact_match",
        ),
        ((), r"row 1 of a batch \(source 'code'\) has reward_names=\(\).*at least one name"),
        ("length", "has reward_names='length'.*tuple"),
    ],
)
def test_another_name_is_refused_by_row_and_source(given, named):
    batch = {"reward_names": [None, given], "source_name": ["math", "code"]}
    with pytest.raises(ValueError, match=named):
        check_judges(batch, ("length", "exact_match"), 2)


def test_too_few_entries_are_refused():
    with pytest.raises(ValueError, match="`reward_names` has 1 entries for 2 rows"):
        check_judges({"reward_names": [None]}, ("length",), 2)
