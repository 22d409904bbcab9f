"""A chat template with tools, policies that say what a test wants, and environments that behave and that do not."""

import random
import re
import time

import torch
from torch import nn

from alignment_modules.rollouts import SamplingParameters
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.engines import InProcessEngine
from alignment_modules.rollouts.environments import Call, EnvironmentSet, Parsed, ToolOptions
from alignment_modules.rollouts.environments.loop import Episodes
from alignment_modules.rollouts.seeds import Seeds

SPECIAL = ("<|user|>", "<|assistant|>", "<|tool|>")
TEMPLATE = """{%- for tool in tools or [] %}{{ tool.function.name }}{{ ' ' }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|assistant|>' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{% set f = call.function %}
{{- '<tool_call>{"name": "' + f.name + '", "arguments": ' }}{{ f.arguments | tojson }}{{ '}</tool_call>' }}
{%- endfor %}{{ eos_token }}
{%- else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def call(name, **arguments):
    """A call as the template writes it."""
    import json

    return f'<tool_call>{{"name": "{name}", "arguments": {json.dumps(arguments)}}}</tool_call>'


class Scripted(nn.Module):
    """Says after each `<|assistant|>` what a function of the text before it returns, and a stop token."""

    def __init__(self, tokenizer, speak):
        super().__init__()
        self.tokenizer, self.speak = tokenizer, speak
        self.scale = nn.Parameter(torch.tensor(60.0))
        self.header = tokenizer.convert_tokens_to_ids("<|assistant|>")
        self.turns, self.seen, self.known = {}, [], {}

    def forward(self, ids):
        said = torch.tensor([self.following(tuple(tokens)) for tokens in ids.tolist()])
        return self.scale * torch.nn.functional.one_hot(said, len(self.tokenizer))

    def following(self, tokens):
        """What comes after each of them."""
        self.seen.append(list(tokens))
        if tokens not in self.known:
            before = self.known.get(tokens[:-1], [])
            starts = [place for place, token in enumerate(tokens) if token == self.header]
            found = list(before)
            for place in range(len(before), len(tokens)):
                start = max((one for one in starts if one <= place), default=None)
                found.append(self.next(list(tokens), start, place))
            self.known[tokens] = found
        return self.known[tokens]

    def next(self, tokens, start, place):
        if start is None:
            return 3
        turn, said = self.turn(tuple(tokens[: start + 1])), tokens[start + 1 : place + 1]
        return turn[len(said)] if turn[: len(said)] == said and len(said) < len(turn) else self.tokenizer.eos_token_id

    def turn(self, context):
        if context not in self.turns:
            text = self.speak(self.tokenizer.decode(list(context)))
            self.turns[context] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.turns[context]


def letters(text):
    """Calls in the random text of a tiny model: a turn that ends with a digit adds it, others are answers."""
    match = re.search(r"[0-9]$", text)
    return Parsed([Call("add", {"number": int(match.group())})], [], text[:-1]) if match else Parsed([], [], text)


class LettersFormat:
    """The same, with the letters that end a turn."""

    stop_strings = (*"0123456789", *"eo")

    def parse(self, text):
        return letters(text)


class Sum:
    """Digits are added until there are enough."""

    def reset(self, goal: int, seed: int) -> str:
        self.goal, self.total, self.turns = goal, random.Random(seed).randint(0, 3), 1
        return f"From {self.total} to {goal}."

    def add(self, number: int) -> str:
        """Adds a number.

        Args:
            number: The number.
        """
        self.total, self.turns = self.total + number, self.turns + 1
        return f"now {self.total}"

    def get_reward(self) -> float:
        return min(self.total / self.goal, 1.0)


class Stepwise(Sum):
    """The same, with a reward a turn; the last turn is the one that called nothing."""

    def reset(self, goal: int, seed: int) -> str:
        self.given = []
        return super().reset(goal, seed)

    def add(self, number: int) -> str:
        """Adds a number.

        Args:
            number: The number.
        """
        self.given.append(float(number))
        return super().add(number)

    def turn_rewards(self) -> list[float]:
        return [*self.given, 0.5]


class Broken(Sum):
    """Fails where `how` says."""

    def reset(self, goal: int, how: str, seed: int) -> str:
        self.how = how
        if how == "reset":
            raise KeyError("nothing there")
        if how == "text":
            return 7
        if how == "late":
            time.sleep(5)
        return super().reset(goal, seed)

    def get_reward(self) -> float:
        if self.how == "reward":
            raise RuntimeError("no reward")
        return {"text reward": "a lot", "nan": float("nan"), "none": None}.get(self.how, super().get_reward())


def batch_of(questions, **columns):
    """Prompts as the data module gives them, whose own ids the loop has no use for."""
    ids = torch.ones(len(questions), 2, dtype=torch.int64)
    messages = [[{"role": "user", "content": text}] for text in questions]
    return {
        "prompts": ids,
        "prompt_attention_mask": torch.ones_like(ids),
        "prompt": messages,
        "index": list(range(len(questions))),
        **columns,
    }


def play(policy, tokenizer, batch, environments=None, tools=None, *, samples=1, seeds=None, length=400, **options):
    """Runs episodes of a policy: the completions, and the engine that made them."""
    codec = Codec(tokenizer)
    given = options.pop("options", None) or ToolOptions()
    made = Episodes(EnvironmentSet(environments, tools), codec, options=given, **options)
    engine = InProcessEngine(codec)
    engine.push(policy)
    parameters = SamplingParameters(length)
    seeds = seeds or Seeds(batch["index"], seed=5)
    return made.run(policy, engine, batch, parameters, num_samples=samples, seeds=seeds)
