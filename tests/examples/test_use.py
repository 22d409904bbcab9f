"""The examples of use run, small in the fast tier; at their own sizes, in the slow one, they do what they say."""

import importlib

import pytest

from tests.examples.conftest import EXAMPLES

NAMES = (
    "early_stopping",
    "fabric_loop",
    "fine_tune",
    "lightning_project",
    "own_environment",
    "reward_cookbook",
    "reward_model",
    "sweep",
)


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Imports an example by its name; what it writes lies in a folder of the test's own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # `seed_everything` sets it; put back after the test
    monkeypatch.chdir(tmp_path)
    return importlib.import_module


@pytest.mark.parametrize("name", NAMES)
def test_a_single_readable_file(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert 40 <= len(text.splitlines()) <= 120
    assert f"python examples/{name}.py" in text.split('"""')[1]


def test_rewards_say_what_the_cookbook_tells(example, capsys):
    cookbook = example("reward_cookbook")
    cookbook.main()
    *lines, total = [line.split() for line in capsys.readouterr().out.splitlines()]
    expected = {
        "regex_match": [1, 1, 0, 1],
        "tags": [1, 1, 0, 1],
        "numeric_answer": [1, 0, 0, 1],
        "close": [1, 0.5, 0, 1],  # 49 is one off
        "short": [0.98, 0, 0, 0.97],  # 9 and 11 words, of right answers alone
        "repeated": [0, -0.3, 0, 0],  # of ten trigrams three come again
        "names_a_unit": [1, 0, 1, float("nan")],
        "ask_judge": [1, 1, 0.5, 1],
    }
    assert [line[0] for line in lines] == [*expected]
    for line, values in zip(lines, expected.values(), strict=True):
        assert [*map(float, line[3:])] == pytest.approx(values, nan_ok=True), line
    assert [*map(float, total[1:])] == pytest.approx([2.39, 0.65, 0.35, 2.19])


def test_rewards_of_odd_completions(example):
    cookbook = example("reward_cookbook")
    odd = ["", "<answer></answer>", "<answer>x</answer>", "<answer>" * 3 + "4" + "</answer>", "<answer>-4.5</answer>"]
    assert cookbook.close(odd, ["4"] * 5) == pytest.approx([0, 0, 0, 1, 1 / 9.5])
    assert cookbook.tags(odd) == [0, 0.5, 0.5, 0.25, 0.5]
    assert cookbook.repeated(["", "a b", "a a a a"]) == [0, 0, -0.5]
    assert cookbook.short(["<answer>4</answer>"] * 2, [[0] * 200, [0] * 900], [4, 4]) == [0.5, 0.5]


def test_a_judge_that_fails_is_asked_again_and_then_not_judged(example, monkeypatch):
    cookbook = example("reward_cookbook")
    asked = []

    async def broken(completions, prompts):
        asked.append(len(completions))
        raise ConnectionError

    monkeypatch.setattr(cookbook.judge, "__wrapped__", broken)
    monkeypatch.setattr("alignment_modules.rewards.patient.time.sleep", lambda seconds: None)
    table = cookbook.RewardSet([cookbook.judge])(completions=["a", "b"], prompts=["c", "d"])
    assert table.values.isnan().all()
    assert asked == [1] * 6


SMALL = {
    "early_stopping": {"epochs": 1},
    "fabric_loop": {"epochs": 1},
    "fine_tune": {"epochs": 1},
    "lightning_project": {"steps": 100},
    "own_environment": {"sft_steps": 40, "grpo_steps": 1},
    "reward_model": {"reward_steps": 5, "grpo_steps": 2},
    "sweep": {"rates": (3e-3,), "steps": 30},
}


@pytest.mark.parametrize("name", SMALL)
def test_runs(name, example):
    assert example(name).main(**SMALL[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fabric_loop", "fine_tune", "lightning_project"])
def test_learns(name, example):
    assert example(name).main() > 0.8


@pytest.mark.slow
def test_stops_where_the_answers_are_right(example, tmp_path):
    step, exact = example("early_stopping").main()
    assert step < 1080  # all epochs
    assert exact >= 0.95
    assert (tmp_path / "runs/early_stopping/export/model.safetensors").exists()


@pytest.mark.slow
def test_the_middle_rate_is_best(example, tmp_path):
    exact = example("sweep").main()
    assert max(exact, key=exact.__getitem__) == 3e-3
    assert len([*tmp_path.glob("runs/sweep/lr_*")]) == 3


@pytest.mark.slow
def test_the_environment_teaches_to_pay_with_few_coins(example):
    before, after = example("own_environment").main()
    assert before["test/reward"] < 0.6
    assert after["test/reward"] > 0.7  # 0.716 is the most that there is
    assert after["test/tools/calls"] < before["test/tools/calls"]


@pytest.mark.slow
def test_the_policy_learns_what_the_reward_model_likes(example):
    (before, _), (after, _) = example("reward_model").main()
    assert after > before + 1
