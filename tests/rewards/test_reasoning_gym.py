"""Problems of reasoning-gym and their scores, with what stands for the package and, where it is there, with itself."""

import importlib.util
import re

import pytest

from alignment_modules.rewards import RewardError, RewardSet
from alignment_modules.rewards import reasoning_gym as rewards_module
from alignment_modules.rewards.reasoning_gym import ReasoningGymScore
from datamodules import PromptDataModule
from datamodules.tasks import ReasoningGymPrompts, character_tokenizer
from tests import puzzles

MISSING = importlib.util.find_spec("reasoning_gym") is None


@pytest.fixture(autouse=True)
def fresh():
    rewards_module._judge.cache_clear()
    yield
    rewards_module._judge.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    puzzles.install(monkeypatch)


@pytest.fixture(params=["stand-in", pytest.param("package", marks=pytest.mark.skipif(MISSING, reason="not installed"))])
def package(request, monkeypatch):
    if request.param == "stand-in":
        puzzles.install(monkeypatch)


def questions(**options):
    rows = ReasoningGymPrompts(**({"task": "chain_sum", "split": "train", "size": 50, "chat": False} | options))
    return [row["prompt"] for row in rows]


def test_no_question_comes_twice_or_in_two_splits(package):
    found = {
        split: [set(questions(split=split, seed=seed, parameters={"max_terms": 2})) for seed in (0, 1)]
        for split in ("train", "validation", "test")
    }
    assert all(len(one) == 50 for pair in found.values() for one in pair)
    train, validation, test = (first | second for first, second in found.values())
    assert not train & validation | train & test | validation & test
    assert len(found["train"][0] & found["train"][1]) < 10  # the package's own neighbouring seeds share 49
    assert questions() == questions() != questions(seed=1)


def test_the_right_answer_is_scored_by_the_task(package):
    prompts = ReasoningGymPrompts(task="chain_sum", split="test", size=4)
    assert prompts[0]["prompt"][0]["role"] == "user"
    columns = {name: [row[name] for row in prompts] for name in ("task", "entry", "answer")}
    rewards = RewardSet([ReasoningGymScore()])
    assert rewards.names == ("reasoning_gym",)
    rewards.check_columns(columns)
    answers = [f" {answer}\n" for answer in columns["answer"]]
    assert rewards(completions=answers, columns=columns).total.tolist() == [1.0] * 4
    wrong = rewards(completions=["1234567", "what?", "", "\x00"], columns=columns).total
    assert wrong.max() <= 0.02


def test_the_answer_within_tags(stand_in):
    row = ReasoningGymPrompts(task="chain_sum", split="test", size=1)[0]
    score = ReasoningGymScore(extract="(?s)<answer>(.*?)</answer>")
    told = [f"I think.\n<answer> {row['answer']} </answer>", row["answer"], "<answer>1</answer>"]
    assert score(told, [row["task"]] * 3, [row["entry"]] * 3) == [1.0, 0.0, 0.01]


def test_rows_reach_the_batch_as_they_are(stand_in):
    prompts = ReasoningGymPrompts(task="chain_sum", split="train", size=4, parameters={"max_terms": 3})
    data = PromptDataModule(train=prompts, tokenizer=character_tokenizer("0123456789+= "), batch_size=4, shuffle=False)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert ReasoningGymScore()(batch["answer"], batch["task"], batch["entry"]) == [1.0] * 4
    assert batch["task"][0] == "('chain_sum', {'max_terms': 3})"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "chain_sun"}, "task='chain_sun' must be one of broken, chain_sum"),
        ({"parameters": {"nosuch": 1}}, "refuses size=50 and parameters={'nosuch': 1}: .*nosuch"),
        ({"parameters": {"max_terms": 1}}, "max_terms must be above 1"),
        ({"parameters": {"seed": 1}}, "must not hold 'seed'"),
        ({"task": "few"}, "size=50: task='few' has 2. distinct problems of the train split"),
        ({"task": "odd"}, "task='odd': its problems hold more than plain values"),
        ({"split": "dev"}, "split='dev'"),
        ({"size": 0}, "size=0"),
    ],
)
def test_refuses(stand_in, options, words):
    with pytest.raises(ValueError, match=words):
        questions(**options)


def test_rows_that_are_no_problems(stand_in):
    row = ReasoningGymPrompts(task="chain_sum", split="train", size=1)[0]
    score = ReasoningGymScore()
    with pytest.raises(RewardError, match="column 'entry' is not what ReasoningGymPrompts writes in row 0: 'x='"):
        score(["1"], [row["task"]], ["x="])
    for task in ("chain_sum", "('nosuch', {})", None):
        with pytest.raises(RewardError, match=f"task={re.escape(repr(task))} is no task"):
            score(["1"], [task], [row["entry"]])
    with pytest.raises(RewardError, match="cannot judge row 0: RuntimeError: no"):
        score(["1"], ["('broken', {})"], [row["entry"]])


def test_says_which_package_is_missing(monkeypatch):
    puzzles.remove(monkeypatch)
    for make in (questions, ReasoningGymScore):
        with pytest.raises(ImportError, match=r"needs the package reasoning-gym .*pip install 'alignment-modules\["):
            make()
