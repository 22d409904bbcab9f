"""Verifiers against answers worked out by hand."""

import random
import re
import time
from decimal import Decimal, FloatOperation, Inexact, localcontext

import pytest

from alignment_modules.rewards import (
    ExactMatch,
    NumericAnswer,
    PatientReward,
    RegexMatch,
    RewardError,
    RewardSet,
    SoftOverlong,
)
from alignment_modules.rewards.patterns import TIME_LIMIT
from alignment_modules.rewards.verifiers import TAIL_CHARACTERS, last_number


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


# how numbers are read, written plainly; the time it takes grows with the square of the digits between commas
PLAIN_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?(?:/\d+)?"
)


def test_numbers_are_read_as_the_plain_pattern_says():
    draw = random.Random(0)
    pieces = ["1", "0", "23", "456", "000", ",", ",", "-", ".", "e", "/", " ", "+", "x", ")"]
    for _ in range(5000):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 12)))
        found = [match.group().replace(",", "") for match in PLAIN_NUMBER.finditer(text)]
        numerator, _, denominator = found[-1].partition("/") if found else ("", "", "")
        if not found or (denominator and not int(denominator)):
            assert last_number(text) is None, text
        else:
            assert last_number(text) == Decimal(numerator) / Decimal(denominator or 1), text


def seconds(function):
    started = time.process_time()
    function()
    return time.process_time() - started


HOSTILE = {
    "groups": "1" + ",000" * 50_000 + "0",
    "digits": "9" * 200_000,
    "fraction of digits": "9" * 200_000 + "/3",
    "slashes": "1/" * 50_000,
    "exponents": "1e1" * 50_000,
    "points": "." * 200_000,
    "signs": "-" * 200_000,
    "blanks": "\\frac" + " " * 200_000,
    "open fractions": ("\\frac{9" + " " * 50) * 5_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_long_hostile_text_is_read_in_linear_time(name):
    assert seconds(lambda: last_number(HOSTILE[name])) < 2
    assert seconds(lambda: NumericAnswer()(completions=[HOSTILE[name]] * 50, answer=[1] * 50)) < 2


def test_long_numbers_are_read_whole():
    assert last_number("1," * 20_000 + "1e" + "9" * 20_000) is not None
    assert last_number("1,000" + ",000" * 5_000 + ",") == Decimal(10) ** (3 * 5001)
    assert NumericAnswer()(completions=["1" + "0" * 5000, "1"], answer=[10**5000] * 2) == [1.0, 0.0]
    assert ExactMatch()(completions=["1" + "0" * 5000, "1"], answer=[10**5000] * 2) == [1.0, 0.0]


def test_only_the_end_of_a_completion_is_read():
    rest = "x" * (TAIL_CHARACTERS - 2)
    # of a number that the cut goes through, the rest is not taken for the number
    completions = ["7 " + rest, "57 " + rest, "7 x" + rest]
    assert NumericAnswer()(completions=completions, answer=[7, 7, 7]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("1e999999", 1, 0.0),
        ("1e999", "1e-999", 0.0),
        ("\N{ARABIC-INDIC DIGIT THREE}", "3", 1.0),
        ("x\N{SUPERSCRIPT TWO}", "2", 0.0),
        ("0.3", 0.1 + 0.2, 0.0),
        ("1", float("nan"), None),
        ("1/3", "2/6", 1.0),
    ],
)
def test_odd_numbers(completion, answer, score):
    assert NumericAnswer()(completions=[completion], answer=[answer]) == [score]
    with localcontext(traps=[Inexact, FloatOperation], prec=3):  # settings of the program change nothing
        assert NumericAnswer(tolerance=1e-30)(completions=[completion], answer=[answer]) == [score]


def test_answers_that_are_not_there():
    assert ExactMatch()(completions=["nan", "1"], answer=[float("nan"), None]) == [None, None]


PATTERNS = {
    "nested": (RegexMatch(r"(?:a|a?)+?$"), "a" * 5000 + "b"),
    "anything, twice": (RegexMatch(r"(?s)<think>.*</think>\s*<answer>.*</answer>"), "<think></think>" * 8000),
    "lazy": (RegexMatch(r"(?s)<a>.*?</a>\s*<b>.*?</b>", full=True), "<a>" + "</a><b>" * 40_000),
    "extract": (ExactMatch(extract=r"\\boxed\{(.*?)\}"), "\\boxed{" * 20_000),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_have_a_time_limit(name, caplog):
    reward, text = PATTERNS[name]
    columns = {"answer": ["1"] * 2} if isinstance(reward, ExactMatch) else {}
    scores = []
    assert seconds(lambda: scores.extend(reward(completions=[text] * 2, **columns))) < 4 * TIME_LIMIT
    assert scores == [0.0, 0.0]
    assert len([record for record in caplog.records if "took more than" in record.getMessage()]) == 1


def test_regex():
    assert RegexMatch(r"\d+")(completions=["a1b", "ab"]) == [1.0, 0.0]
    assert RegexMatch(r"\d+", full=True)(completions=["12", "a12", "12\n"]) == [1.0, 0.0, 0.0]


def test_soft_overlong_follows_its_three_pieces():
    reward = SoftOverlong(max_length=20, buffer=8)
    lengths = [0, 12, 13, 16, 19, 20, 21, 500]
    assert reward(completion_ids=[[0] * n for n in lengths]) == [0, 0, -1 / 8, -0.5, -7 / 8, -1, -1, -1]


def test_soft_overlong_takes_the_limits_of_rows():
    lengths, limits = [5, 9, 10, 17, 1, 20], [10, 10, 10, None, 1, 50]
    reward, fixed = SoftOverlong(), SoftOverlong(20, 4)
    reward.limit_to(20)
    ids = [[0] * n for n in lengths]
    assert reward(completion_ids=ids, completion_limits=limits) == [0, -0.5, -1, -0.25, -1, -1]
    assert fixed(completion_ids=ids, completion_limits=limits) == fixed(completion_ids=ids) == [0, 0, 0, -0.25, 0, -1]


def test_soft_overlong_takes_the_limit_of_who_samples():
    reward = SoftOverlong()
    with pytest.raises(RewardError, match="max_length=None: the longest completion is known to a module alone"):
        reward(completion_ids=[[0]])
    RewardSet([PatientReward(reward), len_of := SoftOverlong(12, 2), lambda completions: [0.0]]).limit_to(20)
    assert (reward.max_length, reward.buffer, len_of.max_length) == (20, 4, 12)  # DAPO: 4096 of 20480
    assert reward(completion_ids=[[0] * n for n in (16, 17, 20)]) == [0, -0.25, -1]
    with pytest.raises(ValueError, match=r"buffer=8 must lie within \[1, max_length=4\]"):
        RewardSet([SoftOverlong(buffer=8)]).limit_to(4)


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
    with pytest.raises(RewardError, match=rf"reward '{reward.name}' asks for 'gold', .* found: answer"):
        RewardSet([reward])(completions=["1"], columns={"answer": ["1"]})


def test_an_answer_without_a_number_is_a_mistake_in_the_data():
    with pytest.raises(RewardError, match=r"column 'answer' holds no number in row 1: 'many'"):
        NumericAnswer()(completions=["1", "2"], answer=["1", "many"])


def test_verifiers_are_evaluation_metrics_too():
    scores = ExactMatch()(completions=["1", "2", "3", "4"], answer=["1", "2", "0", "4"])
    assert sum(scores) / len(scores) == 0.75
