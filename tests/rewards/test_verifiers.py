"""Verifiers against answers worked out by hand."""

from decimal import Decimal

import pytest

from alignment_modules.rewards import ExactMatch, NumericAnswer, RegexMatch, RewardError, RewardSet, SoftOverlong
from alignment_modules.rewards.verifiers import last_number


@pytest.mark.parametrize(
    ("reward", "completion", "answer", "score"),
    [
        (ExactMatch(), " 42\n", "42", 1.0),
        (ExactMatch(), "42", 42, 1.0),
        (ExactMatch(), "42.", "42", 0.0),
        (ExactMatch(strip=False), " 42", "42", 0.0),
        (ExactMatch(), "Paris", "paris", 0.0),
        (ExactMatch(ignore_case=True), "PARIS", "paris", 1.0),
        (ExactMatch(), "b", ["a", "b"], 1.0),
        (ExactMatch(), "c", ["a", "b"], 0.0),
        (ExactMatch(), "c", [], 0.0),
        (ExactMatch(), "x", None, None),
        (ExactMatch(extract=r"#### (\S+)"), "#### 1 no #### 2", "2", 1.0),
        (ExactMatch(extract=r"#### (\S+)"), "2", "2", 0.0),
        (ExactMatch(extract=r"\d+"), "it is 7 or 8", "8", 1.0),
        (NumericAnswer(), "the total is 1,234.50 dollars", 1234.5, 1.0),
        (NumericAnswer(), "12 then 13", "12", 0.0),
        (NumericAnswer(), "72", "48 + 24 = 72 #### 72", 1.0),
        (NumericAnswer(), "nothing", 1, 0.0),
        (NumericAnswer(), "1", None, None),
        (NumericAnswer(), "-5", "-5", 1.0),
        (NumericAnswer(), "0.5", "1/2", 1.0),
        (NumericAnswer(), "1/0", 1, 0.0),
        (NumericAnswer(), "0.1", 0.1, 1.0),
        (NumericAnswer(), "99999999999999999999", "99999999999999999998", 0.0),
        (NumericAnswer(tolerance=0.1), "2.6", 2.5, 1.0),
        (NumericAnswer(tolerance=0.1), "2.61", 2.5, 0.0),
        (NumericAnswer(extract=r"<a>(.*)</a>"), "<a>3</a> 4", 3, 1.0),
    ],
)
def test_answers(reward, completion, answer, score):
    assert reward(completions=[completion, completion], answer=[answer, answer]) == [score, score]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("no digits. - , e", None),
        ("4.", "4"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("7-3", "3"),
        ("7 - 3", "3"),
        ("7 -3", "-3"),
        ("x=-3", "-3"),
        ("1,000, and", "1000"),
        ("1,000,000", "1000000"),
        ("1,2", "2"),
        ("2e3", "2000"),
        ("1e-2", "0.01"),
        ("1.2.3", "3"),
        ("1e9999999", "9999999"),
        ("3/4", "0.75"),
        ("x3", "3"),
        ("(2)-1", "1"),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_a_long_hostile_text_is_read_quickly():
    assert last_number("1," * 20_000 + "1e" + "9" * 20_000) is not None
    assert last_number("1,000" + ",000" * 5_000 + ",") == Decimal(10) ** (3 * 5001)


def test_regex():
    assert RegexMatch(r"\d+")(completions=["a1b", "ab"]) == [1.0, 0.0]
    assert RegexMatch(r"\d+", full=True)(completions=["12", "a12", "12\n"]) == [1.0, 0.0, 0.0]


def test_soft_overlong_follows_its_three_pieces():
    reward = SoftOverlong(max_length=20, buffer=8)
    lengths = [0, 12, 13, 16, 19, 20, 21, 500]
    assert reward(completion_ids=[[0] * n for n in lengths]) == [0, 0, -1 / 8, -0.5, -7 / 8, -1, -1, -1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RegexMatch("("), r"pattern='\(' is not a regular expression"),
        (lambda: ExactMatch(extract="["), r"extract='\[' is not a regular expression"),
        (lambda: NumericAnswer(tolerance=-1.0), r"tolerance=-1.0 must be a finite number of 0 or more"),
        (lambda: NumericAnswer(tolerance=float("nan")), r"tolerance=nan must be"),
        (lambda: SoftOverlong(4, 0), "buffer=0 must be an integer from 1"),
        (lambda: SoftOverlong(4, 5), r"buffer=5 must lie within \[1, max_length=4\]"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("reward", [ExactMatch(column="gold"), NumericAnswer(column="gold")])
def test_missing_column_is_named_with_what_is_there(reward):
    with pytest.raises(RewardError, match=r"column='gold' is not in the data; found: answer, source"):
        reward(completions=["1"], answer=["1"], source=["a"])
    with pytest.raises(RewardError, match=rf"reward '{reward.name}': column='gold' .*found: answer"):
        RewardSet([reward])(completions=["1"], columns={"answer": ["1"]})


def test_an_answer_without_a_number_is_a_mistake_in_the_data():
    with pytest.raises(RewardError, match=r"column 'answer' holds no number in row 1: 'many'"):
        NumericAnswer()(completions=["1", "2"], answer=["1", "many"])


def test_verifiers_are_evaluation_metrics_too():
    scores = ExactMatch()(completions=["1", "2", "3", "4"], answer=["1", "2", "0", "4"])
    assert sum(scores) / len(scores) == 0.75
