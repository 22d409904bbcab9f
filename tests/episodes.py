"""Episodes for the contract tests: a tiny random model acts on an environment, row by row in other numbers of turns."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from alignment_modules import AlignmentModule, get_module_class
from alignment_modules.rollouts.environments import ToolOptions
from tests.batches import Batch
from tests.models import critic_beside, other_than
from tests.rollouts.environments.acting import SPECIAL, TEMPLATE, Sum, batch_of

CHARACTERS = [*map(chr, range(32, 127)), "\n"]
GOALS = (6, 20, 3, 9, 12, 30, 5, 15)


class Sometimes(Sum):
    """Fails in `get_reward` where a row says so."""

    def reset(self, goal: int, seed: int, fails: bool = False) -> str:
        self.fails = fails
        return super().reset(goal, seed)

    def get_reward(self) -> float:
        if self.fails:
            raise RuntimeError("no reward")
        return super().get_reward()


class Unjudged:
    """Digits are added, and nobody judges; a row may have it fail."""

    def reset(self, goal: int, fails: bool = False) -> str:
        if fails:
            raise RuntimeError("no game")
        self.total = 0
        return f"To {goal}."

    def add(self, number: int) -> str:
        """Adds a number.

        Args:
            number: The number.
        """
        self.total += number
        return f"now {self.total}"


def tokenizer() -> Any:
    """Of characters, with a chat template that shows tools."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", *SPECIAL, *CHARACTERS]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    found = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=[*SPECIAL], **names)
    found.chat_template = TEMPLATE
    return found


def policy() -> nn.Module:
    """Of random weights, which write digits as often as anything: a digit is a call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    torch.manual_seed(0)
    vocabulary = {"vocab_size": 3 + len(SPECIAL) + len(CHARACTERS), "pad_token_id": 0, "bos_token_id": 1}
    config = AutoConfig.for_model("llama", eos_token_id=2, **vocabulary, **sizes, **heads)
    return AutoModelForCausalLM.from_config(config).eval()


def batch(rows: Sequence[int], **columns: Any) -> Batch:
    """Prompts of numbered rows, which differ in their goals."""
    goals = [GOALS[row] for row in rows]
    return batch_of([f"Row {row}." for row in rows], goal=goals, index=[10 + row for row in rows], **columns)


def labelled(rows: Sequence[int], **columns: Any) -> Batch:
    """The same as rows with a completion of three tokens, with the columns that the data module hands on."""
    given = batch(rows, **columns)
    ids = torch.arange(8, 14).repeat(len(rows), 1)
    labels = torch.where(torch.arange(6) < 3, -100, ids)
    del given["prompts"], given["prompt_attention_mask"]
    return given | {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


ACTING: dict[str, Any] = {
    "environments": Sometimes,
    "tool_options": ToolOptions(format="tests.rollouts.environments.acting.LettersFormat"),
    "max_turns": 4,
    "max_completion_length": 100,
    "max_grad_norm": None,
    "seed": 3,
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"num_generations": 4, "beta": 0.1}),
    "rloo": ("grpo", {"num_generations": 4, "baseline": "leave_one_out", "scale_rewards": "batch"}),
    "ppo": ("ppo", {"num_generations": 4, "beta": 0.1}),
    "ppo turns": ("ppo", {"num_generations": 4, "gae_unit": "turn", "lam": 0.5, "gamma": 0.9, "beta": 0.1}),
    "online_dpo": ("online_dpo", {"beta": 0.5}),
}
"""Paradigms that act, and their options."""


def build(name: str, start: nn.Module, **options: Any) -> AlignmentModule:
    """A paradigm's module on a copy of a policy, with a reference and, where it needs one, a critic near it."""
    paradigm, given = OPTIONS[name]
    other = other_than(start)
    given = ACTING | given | options
    if given.get("beta"):
        given.setdefault("reference", copy.deepcopy(other))
    if paradigm == "ppo":
        given.setdefault("critic", critic_beside(other))
        given.setdefault("critic_optimizer", lambda groups: torch.optim.SGD(groups, lr=1.0))
    return get_module_class(paradigm)(policy=copy.deepcopy(start), tokenizer=tokenizer(), **given)


def distils(start: nn.Module, **options: Any) -> AlignmentModule:
    """On-policy distillation on an environment that nobody judges, of a copy of a policy from one near it."""
    acting = {name: value for name, value in ACTING.items() if name != "max_grad_norm"}  # the Trainer clips
    given = acting | {"environments": Unjudged, "teacher": other_than(start), "on_policy_share": 1.0} | options
    return get_module_class("distillation")(policy=copy.deepcopy(start), tokenizer=tokenizer(), **given)
