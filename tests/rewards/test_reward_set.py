"""RewardSet: what each reward is given, how rewards add up, and how mistakes are reported."""

import asyncio
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from alignment_modules.rewards import ExactMatch, RegexMatch, RewardError, RewardSet, SoftOverlong


def length(completions):
    return [len(text) for text in completions]


def test_values_weights_and_names():
    table = RewardSet([length, ExactMatch(), SoftOverlong(4, 2)], weights=[0.5, 2.0, 1.0])(
        prompts=["p", "q"],
        completions=["aa", "b", "cccc", "d"],
        prompt_ids=[[1], [2, 3]],
        completion_ids=[[0] * 2, [0], [0] * 4, [0]],
        columns={"answer": ["b", "d"]},
    )
    assert table.names == ("length", "exact_match", "soft_overlong")
    assert table.values.dtype == table.total.dtype == torch.float32
    assert table.values.tolist() == [[2, 0, 0], [1, 1, 0], [4, 0, -1], [1, 1, 0]]
    assert table.total.tolist() == [1.0, 2.5, 1.0, 2.5]


def test_each_reward_gets_what_it_asks_for_repeated_to_the_completions():
    seen = {}

    def picky(completions, prompt_ids, level=None, absent="default"):
        seen["picky"] = (completions, prompt_ids, level, absent)
        return [0.0] * len(completions)

    def greedy(**everything):
        seen["greedy"] = everything
        return [0.0] * len(everything["completions"])

    RewardSet([picky, greedy])(
        prompts=["p", "q"],
        completions=["a", "b", "c", "d"],
        prompt_ids=[[1], [2, 3]],
        completion_ids=[[4], [5], [6], []],
        columns={"level": torch.tensor([7, 8]), "kept": ["w", "x", "y", "z"]},
    )
    assert seen["picky"] == (["a", "b", "c", "d"], [[1], [1], [2, 3], [2, 3]], [7, 7, 8, 8], "default")
    assert seen["greedy"]["prompts"] == ["p", "p", "q", "q"]
    assert seen["greedy"]["kept"] == ["w", "x", "y", "z"]
    assert set(seen["greedy"]) == {"prompts", "completions", "prompt_ids", "completion_ids", "level", "kept"}


def test_not_applicable_rows_are_left_out_of_the_sum():
    first = lambda completions: [1.0, None, math.nan]  # noqa: E731
    second = lambda completions: [10.0, 20.0, 30.0]  # noqa: E731
    table = RewardSet([first, second], weights=[1.0, 0.1])(completions=["a", "b", "c"])
    assert table.values.isnan().tolist() == [[False, False], [True, False], [True, False]]
    assert table.total.tolist() == [2.0, 2.0, 3.0]


def test_a_completion_that_no_reward_applies_to_has_no_total():
    first = lambda completions: [1.0, None, None]  # noqa: E731
    second = lambda completions: [None, 2.0, math.nan]  # noqa: E731
    table = RewardSet([first, second], weights=[0.0, 3.0])(completions=["a", "b", "c"])
    assert table.total[:2].tolist() == [0.0, 6.0]
    assert math.isnan(table.total[2])


def test_missing_columns_are_found_without_a_completion():
    def judge(completions, gold, level=None):
        return [0.0] * len(completions)

    rewards = RewardSet([length, judge, ExactMatch()])
    rewards.check_columns(["answer", "gold"])
    with pytest.raises(RewardError, match=r"reward 'judge' asks for 'gold', which is not there; found: answer, compl"):
        rewards.check_columns(["answer"])
    with pytest.raises(RewardError, match=r"reward 'exact_match' asks for 'answer'"):
        rewards.check_columns(["gold"])


def test_a_slow_reward_that_fails_is_not_called_again():
    calls = []

    def judge(completions):
        calls.append(len(completions))
        time.sleep(0.6)
        raise TimeoutError("no answer")

    with pytest.raises(RewardError, match=r"reward 'judge' raised on 64 rows after 0\.\d s: TimeoutError: no answer"):
        RewardSet([judge])(completions=["c"] * 64)
    assert calls == [64]


def test_the_search_for_a_row_ends():
    calls = []

    def judge(completions):
        calls.append(len(completions))
        if len(completions) > 1:
            raise RuntimeError("too many")
        time.sleep(0.02)
        return [0.0]

    with pytest.raises(RewardError, match="raised on 500 rows"):
        RewardSet([judge])(completions=["c"] * 500)
    assert len(calls) < 60


async def patient_length(completions):
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]


def test_asynchronous_rewards_are_awaited_with_and_without_a_running_loop():
    class Judge:
        loops = set()

        async def __call__(self, completions):
            self.loops.add(asyncio.get_running_loop())
            return await patient_length(completions)

    rewards = RewardSet([Judge(), lambda completions: patient_length(completions)])

    def judge():
        return rewards(completions=["a", "bb"]).values.tolist()

    async def notebook():
        return judge()

    assert judge() == asyncio.run(notebook()) == [[1.0, 1.0], [2.0, 2.0]]
    assert len(Judge.loops) == 1  # so that a client serves more than one call


def test_an_asynchronous_reward_that_fails_is_named():
    async def judge(completions):
        await asyncio.sleep(0)
        return [{"a": 1.0}[text] for text in completions]

    with pytest.raises(RewardError, match=r"reward 'judge' raised in row 1 \(completion 'b'\): KeyError: 'b'"):
        RewardSet([judge])(completions=["a", "b"])


@pytest.mark.parametrize(
    "result",
    [
        (1, 0, True),
        torch.tensor([1.0, 0.0, 1.0], requires_grad=True),
        torch.tensor([1, 0, 1]),
        np.array([1.0, 0.0, 1.0]),
        [np.float32(1), torch.tensor(0.0), np.bool_(True).item()],
    ],
)
def test_any_kind_of_numbers(result):
    assert RewardSet([lambda completions: result])(completions=list("abc")).total.tolist() == [1.0, 0.0, 1.0]


def test_a_reward_that_edits_its_arguments_harms_nobody():
    def vandal(completions):
        count = len(completions)
        completions.clear()
        return [0.0] * count

    assert RewardSet([vandal, length])(completions=["aa", "b"]).values[:, 1].tolist() == [2.0, 1.0]


def test_names_are_unique_and_follow_the_function():
    class Judge:
        def __call__(self, completions):
            return [0.0] * len(completions)

    named = Judge()
    named.name = "style"
    rewards = [length, length, functools.partial(length), Judge(), named, RegexMatch("a"), lambda completions: [0.0]]
    names = RewardSet(rewards).names
    assert names == ("length", "length_2", "length_3", "Judge", "style", "regex_match", "lambda")


def test_a_single_callable_a_class_a_module_and_import_paths():
    class Net(nn.Module):
        def forward(self, completions):
            return torch.tensor([float(len(text)) for text in completions])

    assert RewardSet(length)(completions=["abc"]).total.item() == 3
    assert RewardSet([Net()]).to("cpu")(completions=["abc"]).total.item() == 3
    assert RewardSet([ExactMatch, "alignment_modules.rewards.ExactMatch"]).names == ("exact_match", "exact_match_2")
    assert isinstance(RewardSet("alignment_modules.rewards.verifiers.ExactMatch").functions[0], ExactMatch)


def test_no_completions():
    table = RewardSet([length, length])(completions=[], prompts=[])
    assert table.values.shape == (0, 2)
    assert table.total.shape == (0,)


class Holder:
    def __init__(self, rewards: list[Callable[..., Any] | str]):
        self.rewards = RewardSet(rewards)


def test_from_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "model")
    rewards = [
        {"class_path": "alignment_modules.rewards.ExactMatch", "init_args": {"column": "gold"}},
        {"class_path": "alignment_modules.rewards.SoftOverlong", "init_args": {"max_length": 8, "buffer": 4}},
        "alignment_modules.rewards.NumericAnswer",
    ]
    config = parser.parse_object({"model": {"rewards": rewards}})
    reward_set = parser.instantiate_classes(config).model.rewards
    assert reward_set.names == ("exact_match", "soft_overlong", "numeric_answer")
    assert reward_set.functions[0].column == "gold"


def raises_on_b(completions):
    return [{"a": 1.0, "c": 2.0}[text] for text in completions]


def raises_on_many(completions):
    if len(completions) > 1:
        raise RuntimeError("too many")
    return [0.0]


CALL_ERRORS = {
    "raises": (raises_on_b, r"reward 'raises_on_b' raised in row 1 \(completion 'b'\): KeyError: 'b'"),
    "raises on the batch": (
        raises_on_many,
        r"'raises_on_many' raised on 3 rows, though on none of them alone: Runtime",
    ),
    "too few": (lambda completions: [1.0], r"reward 'lambda' returned 1 values for 3 completions"),
    "too many": (lambda completions: [1.0] * 4, r"returned 4 values for 3 completions"),
    "infinite": (lambda completions: [0, math.inf, 0], r"'lambda' returned inf in row 1; it must be finite"),
    "beyond float32": (lambda completions: [0, 0, 1e39], r"returned 1e\+39 in row 2; it must be finite"),
    "beyond float64": (lambda completions: [10**400, 0, 0], r"returned 10+\.\.\. in row 0; it must be finite"),
    "a string": (lambda completions: "abc", r"returned str 'abc'; it must return a list of 3 numbers"),
    "strings": (lambda completions: [0, 0, "1"], r"returned str '1' in row 2; it must be a number"),
    "a number": (lambda completions: 0.5, r"returned float 0.5; it must return a list of 3 numbers"),
    "a dictionary": (lambda completions: {"a": 1}, r"returned dict .*it must return a list"),
    "nothing": (lambda completions: None, r"returned NoneType None; it must return a list"),
    "complex": (lambda completions: [0, 1j, 0], r"returned complex 1j in row 1"),
    "lists": (lambda completions: torch.zeros(3, 2), r"returned list \[0.0, 0.0\] in row 0"),
    "missing column": (
        lambda completions, gold: [0.0] * 3,
        r"'lambda' asks for 'gold', which is not there; found: answer",
    ),
    "unknown parameter": (lambda texts: [0.0] * 3, r"asks for 'texts', which is not there; found: answer, completions"),
    "bad column": (
        lambda completions, short: [0.0] * 3,
        r"column 'short' \(2 entries\) must be a list with one entry per",
    ),
    "scalar column": (lambda completions, scalar: [0.0] * 3, r"column 'scalar' \(str\) must be a list"),
}


@pytest.mark.parametrize("name", CALL_ERRORS)
def test_mistakes_name_the_reward_and_the_row(name):
    reward, message = CALL_ERRORS[name]
    columns = {"answer": ["1"] * 3, "short": [1, 2], "scalar": "abc"}
    with pytest.raises(RewardError, match=message):
        RewardSet([reward])(completions=["a", "b", "c"], prompts=["p"] * 3, columns=columns)


def test_the_original_exception_is_chained():
    with pytest.raises(RewardError) as caught:
        RewardSet([length, raises_on_b])(completions=["a", "b"])
    assert isinstance(caught.value.__cause__, KeyError)
    assert isinstance(caught.value, ValueError)


def test_completions_that_do_not_divide_by_the_prompts():
    with pytest.raises(RewardError, match="3 completions are not a multiple of 2 prompts"):
        RewardSet([length])(completions=["a", "b", "c"], prompts=["p", "q"])


def positional(completions, /):
    return [0.0] * len(completions)


BUILD_ERRORS = {
    "none": ([], None, r"rewards=\[\] must hold at least one"),
    "not callable": ([3], None, r"rewards\[0\]=3 must be callable"),
    "missing module": (["no_such_package.reward"], None, r"rewards\[0\]='no_such_package.reward': no module named"),
    "missing name": (
        ["alignment_modules.rewards.Nope"],
        None,
        r"module 'alignment_modules.rewards' has no attribute 'Nope'",
    ),
    "not a callable path": (["math.pi"], None, r"must be callable"),
    "missing folder": (["./no/such/folder"], None, r"is neither a folder, a hub id, nor an import path"),
    "class with arguments": ([RegexMatch], None, r"is a class that needs arguments; give an instance: .*pattern"),
    "weights count": ([length], [1.0, 2.0], r"weights=\[1.0, 2.0\] must hold one factor for each of the 1 rewards"),
    "weights finite": ([length], [math.nan], r"weights=\[nan\] must be finite"),
    "no arguments": ([lambda: [1.0]], None, r"reward 'lambda' takes no argument"),
    "positional only": ([positional], None, r"reward 'positional' takes 'completions' by position only"),
}


@pytest.mark.parametrize("name", BUILD_ERRORS)
def test_mistakes_in_the_set_are_found_at_once(name):
    rewards, weights, message = BUILD_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        RewardSet(rewards, weights)


def test_a_module_that_fails_to_import_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        RewardSet(["broken_rewards.reward"])


def test_a_user_file_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "mine_for_test.py").write_text(
        "def shout(completions):\n    return [c.isupper() for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    table = RewardSet(["mine_for_test.shout"])(completions=["A", "a"])
    assert (table.names, table.total.tolist()) == (("shout",), [1.0, 0.0])


def test_verifiers_by_their_short_name():
    rewards = RewardSet(["NumericAnswer", ExactMatch()])
    assert rewards.names == ("numeric_answer", "exact_match")
    with pytest.raises(ValueError, match=r"reward_weights=\[0.0, 0.0\] must be finite and not all 0"):
        RewardSet(["NumericAnswer", "ExactMatch"], weights=[0.0, 0.0])
    with pytest.raises(ValueError, match=r"rewards\[0\]='Decimal' is neither"):  # imported there, but no verifier
        RewardSet(["Decimal"])
