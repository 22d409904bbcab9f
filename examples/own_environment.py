"""An environment of your own: the policy pays a price coin by coin, and is told after each coin what is left.

    python examples/own_environment.py

A class with a method `reset` is an environment, and its other public methods are tools. SFT on careless payments shows
a fresh small Llama how a coin is paid; GRPO then teaches it to pay with few coins, by what the environment says alone.
The fewest are 2.84 a payment, a reward of 0.716. `docs/environments.md` tells the interface.
"""

import random
import re
from functools import partial
from typing import Any

import lightning as L
import torch
from transformers.utils import get_json_schema

from alignment_modules import GRPOModule, PolicyConfig, SFTModule
from alignment_modules.evaluation import EvaluationConfig
from alignment_modules.rollouts.environments import ToolOptions
from datamodules import PromptDataModule, SFTDataModule
from datamodules.tasks import character_tokenizer

COINS, HIGHEST, TURNS, LONGEST = (1, 2, 5), 19, 8, 64  # turns and tokens of an episode


class Till:
    """A price to pay with coins of 1, 2 and 5."""

    def reset(self, price: int) -> None:
        """Begins a payment; `price` is a column of the data."""
        self.left, self.paid = price, 0

    def pay(self, coin: int) -> str:
        """Puts a coin on the counter, and tells what is left to pay.

        Args:
            coin: 1, 2 or 5.
        """
        self.paid += 1  # one that is refused costs, too: what costs nothing is tried for ever
        if coin not in COINS or coin > self.left:
            raise ValueError("no such coin, or too much")  # the policy reads this, and may go on
        self.left -= coin
        return str(self.left)

    def get_reward(self) -> float:
        """1 if all is paid, less a tenth for each coin."""
        return (self.left == 0) - 0.1 * self.paid


def read_coin(text: str) -> list[dict[str, Any]]:
    """A turn `$5` is a call of `pay`; one without `$` is an answer, which ends the episode."""
    if "$" not in text:
        return []
    if (found := re.fullmatch(r"\$(\d)", text)) is None:
        raise ValueError("a coin is paid by $1, $2 or $5")  # a malformed call: the policy reads why
    return [{"name": "pay", "arguments": {"coin": int(found[1])}}]


# Tools are shown by their names, a call is written as `$5`, and a result stands behind <tool>.
TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}<tool>{{ tool['function']['name'] }}{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{% generation %}{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}${{ call['function']['arguments'].values() | join }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'tool' %}<tool>{{ message['content'] }}"
    "{% else %}<user>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENIZER = character_tokenizer("0123456789$.pay", roles=("<user>", "<assistant>", "<tool>"), chat_template=TEMPLATE)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "vocab_size": len(TOKENIZER), "num_key_value_heads": 4, **SIZES}
TRAINER = {"max_epochs": -1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}


def payment(price: int, draw: random.Random) -> dict[str, Any]:
    """A careless payment as a conversation: any coin that fits, and a point at the end."""
    till, messages = Till(), [{"role": "user", "content": f"{price:02d}"}]
    till.reset(price)
    while till.left:
        coin = draw.choice([coin for coin in COINS if coin <= till.left])
        call = {"type": "function", "function": {"name": "pay", "arguments": {"coin": coin}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": "pay", "content": till.pay(coin)})
    return {"messages": [*messages, {"role": "assistant", "content": "."}], "tools": [get_json_schema(till.pay)]}


def main(sft_steps: int = 150, grpo_steps: int = 60, folder: str = "runs/till") -> list[dict[str, float]]:
    """Prints and returns what payments are worth after so many steps of SFT, and then of GRPO; exports the policy."""
    L.seed_everything(0)
    draw, prices = random.Random(0), range(1, HIGHEST + 1)
    careless = [payment(draw.choice(prices), draw) for _ in range(1024)]
    sft = SFTModule(policy=PolicyConfig(config=LLAMA), optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.0))
    shown = SFTDataModule(train=careless, tokenizer=TOKENIZER, batch_size=32)
    L.Trainer(max_steps=sft_steps, **TRAINER).fit(sft, shown)
    grpo = GRPOModule(
        policy=sft.policy,
        environments=Till,
        tool_options=ToolOptions(format=read_coin),
        max_turns=TURNS,
        max_completion_length=LONGEST,
        evaluation=EvaluationConfig(max_completion_length=LONGEST),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0),
    )
    rows = [{"prompt": f"{price:02d}", "price": price} for price in prices]
    prompts = PromptDataModule(train=rows, test=rows, tokenizer=TOKENIZER, batch_size=len(rows))
    aligning = L.Trainer(max_steps=grpo_steps, **TRAINER)
    before = aligning.test(grpo, prompts, verbose=False)
    aligning.fit(grpo, prompts)
    found = [*before, *aligning.test(grpo, prompts, verbose=False)]
    grpo.export(folder)
    for stage, metrics in zip(("SFT", "GRPO"), found, strict=True):
        print(f"after {stage}: reward {metrics['test/reward']:.3f}, {metrics['test/tools/calls']:.1f} calls a payment")
    return found


if __name__ == "__main__":
    main()
