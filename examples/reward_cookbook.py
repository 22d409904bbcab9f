r"""Eight rewards to copy from, and what they say of four completions, before anything is trained.

    python examples/reward_cookbook.py

On the command line each goes by its import path, from the folder of this file:

    align fit --config grpo --model.policy.path MODEL --data.train questions.jsonl \
        --model.rewards '[reward_cookbook.well_formed, reward_cookbook.close]' --model.reward_weights '[0.2, 1.0]'

`docs/rewards.md` tells what a reward is asked and may answer.
"""

import asyncio
import re
from typing import Any

from alignment_modules.rewards import NumericAnswer, PatientReward, RegexMatch, RewardSet

ANSWER = r"(?s)<answer>([^<]*+)</answer>"
WELL_FORMED = r"\s*<think>[^<]*+</think>\s*<answer>[^<]*+</answer>\s*"


# 1. The format: a regular expression that the whole completion must match. [^<]*+ cannot backtrack: it is always fast.
well_formed = RegexMatch(WELL_FORMED, full=True)


# 2. The format by degrees, for a policy that never gets it whole: a quarter for each tag that comes exactly once.
def tags(completions: list[str]) -> list[float]:
    """The share of the four tags that come once."""
    wanted = ("<think>", "</think>", "<answer>", "</answer>")
    return [sum(text.count(tag) == 1 for tag in wanted) / 4 for text in completions]


# 3. The answer as a number, read from <answer> alone: "1,000", "1e3" and "2000/2" are the same.
numeric = NumericAnswer(extract=ANSWER)


# 4. How near a wrong answer comes, for problems that are hardly ever solved: `answer` is a column of the data.
def close(completions: list[str], answer: list[Any]) -> list[float]:
    """1 for the right number, one half for one that is off by 1, 0 for none at all."""
    found = [re.search(r"<answer>\s*(-?\d{1,15}(?:\.\d{1,9})?)\s*</answer>", text) for text in completions]
    pairs = zip(found, answer, strict=True)
    return [1 / (1 + abs(float(number[1]) - float(right))) if number else 0.0 for number, right in pairs]


# 5. Length: of right answers the shorter ones are worth more. A penalty on all lengths would teach to say nothing.
def short(completions: list[str], completion_ids: list[list[int]], answer: list[Any]) -> list[float]:
    """From 1 for a right answer of no length down to one half at 200 tokens; 0 for a wrong one."""
    right = numeric(completions, answer=answer)
    return [(hit or 0.0) * (1 - min(len(ids), 200) / 400) for hit, ids in zip(right, completion_ids, strict=True)]


# 6. Repetition, which rewards for length or from a model bring about: minus the share of repeated trigrams.
def repeated(completions: list[str]) -> list[float]:
    """0 where no three words in a row come twice, near -1 where all do."""
    rewards = []
    for text in completions:
        words = text.split()
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        rewards.append(len(set(trigrams)) / len(trigrams) - 1 if trigrams else 0.0)
    return rewards


# 7. Not applicable: None leaves a row out of this reward's mean and of the sum, instead of calling it bad.
def names_a_unit(completions: list[str], unit: list[str | None]) -> list[float | None]:
    """Whether the unit stands in the answer; rows of the data without a unit are not judged."""
    return [None if one is None else float(one in text) for text, one in zip(completions, unit, strict=True)]


# 8. A judge that takes its time. `await` your client here; a call that fails is asked again, and in the end not judged.
async def ask_judge(completions: list[str], prompts: list[str]) -> list[float]:
    """Stands for a judge behind a network (`ChatJudge` asks a real one): it likes thoughts that name their numbers."""
    await asyncio.sleep(0.01)
    pairs = [(text, re.findall(r"\d+", prompt)) for text, prompt in zip(completions, prompts, strict=True)]
    return [sum(number in text for number in named) / max(len(named), 1) for text, named in pairs]


judge = PatientReward(ask_judge, retries=2, timeout=60.0, max_workers=4, on_failure="none")


def chosen() -> RewardSet:
    """All of them with their weights: what is sought counts most, what helps on the way a little."""
    rewards = [well_formed, tags, numeric, close, short, repeated, names_a_unit, judge]
    return RewardSet(rewards, weights=[0.2, 0.2, 1.0, 0.2, 0.3, 0.5, 0.2, 0.3])


PROMPTS = ["A box holds 12 eggs. How many eggs are in 4 boxes?"] * 3 + ["What is 7 times 8?"]
COLUMNS = {"answer": [48, 48, 48, 56], "unit": ["eggs", "eggs", "eggs", None]}
COMPLETIONS = [
    "<think>4 boxes of 12 are 48 eggs.</think> <answer>48</answer>",
    "<think>12 and 4 are 12 and 4 are 12 and 4</think> <answer>49</answer>",
    "48 eggs, of course.",
    "<think>7 times 8, that is 7 times 8, so 56.</think> <answer>56.0</answer>",
]


def main() -> None:
    """Prints a line a reward, a column a completion."""
    rewards = chosen()
    ids = [[0] * len(text.split()) for text in COMPLETIONS]  # words stand for tokens here
    table = rewards(completions=COMPLETIONS, prompts=PROMPTS, completion_ids=ids, columns=COLUMNS)
    for name, weight, values in zip(table.names, rewards.weights, table.values.T.tolist(), strict=True):
        print(f"{name:16}{weight:4} *" + "".join(f"{value:8.2f}" for value in values))
    print(f"{'sum':22}" + "".join(f"{value:8.2f}" for value in table.total.tolist()))


if __name__ == "__main__":
    main()
