"""Environments, tools and rows for them that cannot be used: refused before anything is generated."""

from tests.reliability.bad_cases import PARSING, Case

MODULE = '''
class Asks:
    """An environment that asks for a column."""

    def reset(self, goal: int) -> str:
        return f"The goal is {goal}."

    def add(self, number: int) -> int:
        """Adds.

        Args:
            number: A number.
        """
        return number

    def get_reward(self) -> float:
        return 1.0

class Silent(Asks):
    """It rewards nothing."""

    get_reward = None

class Undocumented(Asks):
    def take(self, number: int) -> int:
        return number

class Several(Asks):
    """Tells every sample another text."""

    told = 0

    def reset(self) -> str:
        Several.told += 1
        return f"The {Several.told}th."
'''
"""What the file `my_environments.py` of the cases holds."""

ACTING = ["--model.policy", "acting", "--model.rewards", "my_rewards.digits", "--data.max_length", "64"]
TWO = '--model.environments={"easy": "my_environments.Asks", "hard": "my_environments.Asks"}'


def environment(name: str) -> list[str]:
    """Arguments of a run on one of these."""
    return [*ACTING, f"--model.environments=my_environments.{name}"]


ENVIRONMENTS = {
    "two environments of one name": Case(
        "grpo",
        ["-c", "bad/environments.yaml"],
        ["--config=bad/environments.yaml: model.init_args.environments.easy is given twice, in lines 4 and 6"],
        PARSING,
    ),
    "two typed environments of one name": Case(
        "grpo",
        [*ACTING, '--model.environments={"a": "my_environments.Asks", "a": "my_environments.Silent"}'],
        ["--model.environments=", "a is given twice, in line 1"],
        PARSING,
    ),
    "an environment that is not there": Case("grpo", environment("Aks"), ["environments='my_environments.Aks'"]),
    "a tool without a docstring": Case("grpo", environment("Undocumented"), ["Undocumented.take", "docstring"]),
    "an environment without rewards": Case(
        "grpo",
        [*environment("Silent"), "--model.rewards=null"],
        ["rewards=None must be reward functions, unless `environments` have a get_reward"],
    ),
    "turns of nothing": Case("grpo", ["--model.max_turns=3"], ["max_turns=3 has no effect without environments"]),
    "a policy whose tokenizer has no chat template": Case(
        "grpo",
        [*environment("Asks"), "--model.policy", "policy"],
        ["no chat template"],
    ),
    "rows without a column that reset asks for": Case(
        "grpo", environment("Asks"), ["reset of environment 'Asks' asks for 'goal'", "columns: answer, prompt"]
    ),
    "rows that name no environment": Case(
        "grpo", [*ACTING, TWO], ["the environments easy, hard need the column 'environment'"]
    ),
    "a row that names an environment that there is none of": Case(
        "grpo",
        [*ACTING, TWO, "--data.train", "bad/named.jsonl"],
        ["environment='midle' must be one of 'easy', 'hard'"],
    ),
    "an environment that tells the samples of a prompt different texts": Case(
        "grpo",
        environment("Several"),
        ["reset of environment 'Several' told two samples of one prompt different texts"],
    ),
    "environments for a module that writes nothing": Case(
        "sft",
        ["--model.environments=my_environments.Asks"],
        ["--model.environments=my_environments.Asks", "SFTModule has no option 'environments'"],
        PARSING,
    ),
}
