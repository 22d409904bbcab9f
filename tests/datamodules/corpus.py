"""Rows of every format with awkward boundaries, and tokenizers that treat these boundaries in different ways."""

import json
import random
import re
import zlib
from functools import cache, partial

from datamodules import (
    PreferenceDataModule,
    PretrainDataModule,
    PromptDataModule,
    SFTDataModule,
    UnpairedDataModule,
)
from tests.datamodules.test_templates import STYLES, make
from tests.datamodules.test_tokens import MISTRAL, byte_level, prefix_space

ENDS = ["", " ", "\n", "=", ":", ": ", ".", "a", "1", "\n\n", "]", "é", "日", "🙂", "\t", "  ", "<eos>", "The", "user"]
WORDS = [
    "the",
    "answer",
    "is",
    "2",
    "hello",
    "1+1=2",
    "Question",
    "a\nb",
    "日本",
    "naïve",
    "user",
    "</s>",
    "<bos>",
    "[x]",
]


class Rows:
    """Draws rows.

    Args:
        seed: Seed of what is drawn.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self, least=0):
        body = " ".join(self.random.choices(WORDS, k=self.random.randint(least, 6)))
        return self.random.choice(ENDS) + body + self.random.choice(ENDS)

    def turns(self, count, marks=False):
        messages = [{"role": "system", "content": self.text(1)}] if self.random.random() < 0.3 else []
        for _ in range(count):
            messages.append({"role": "user", "content": self.text(1)})
            reply = {"role": "assistant", "content": self.text(1)}
            if self.random.random() < 0.2:
                reply["content"] = "<think>\nhm\n</think>\n\n" + reply["content"]
            if self.random.random() < 0.1:
                reply["reasoning_content"] = "so"
            if marks and self.random.random() < 0.5:
                reply["weight"] = self.random.choice([0, 0.5, 1]) if len(messages) < 2 * count - 2 else 2
            messages.append(reply)
        return messages

    def called(self):
        """A conversation with a call and its answer, and the description of what is called."""
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": self.text(1)}}}
        head, tail = self.turns(1), self.turns(1)[-1:]
        head[-1]["tool_calls"] = [call]
        answer = {"role": "tool", "content": self.text(1)}
        tools = [{"type": "function", "function": {"name": "add", "description": self.text(), "parameters": {}}}]
        return {"messages": [*head, answer, *tail], "tools": tools}

    def row(self, kind):
        some = self.random.randint(1, 3)
        if kind == "text":
            return {"text": self.text(1)}
        if kind == "demonstration":
            return {"prompt": self.text(), "completion": self.text()}
        if kind == "messages":
            return {"messages": self.turns(some)}
        if kind == "marked messages":
            return {"messages": self.turns(some, marks=True)}
        if kind == "called":
            return self.called()
        if kind == "chat demonstration":
            messages = self.turns(some)
            return {"prompt": messages[:-1], "completion": messages[-1:]}
        if kind == "pair":
            return {"prompt": self.text(), "chosen": self.text(1), "rejected": self.text(1)}
        if kind == "implicit pair":
            prompt = "User: " + self.text(1) + " Assistant:"
            return {"chosen": prompt + self.text(1), "rejected": prompt + self.text(1)}
        if kind == "chat pair":
            messages, long = self.turns(some), self.random.random() < 0.3
            other = [{"role": "assistant", "content": self.text(1)}]
            more = self.turns(1)[-2:] if long else []
            return {"prompt": messages[:-1], "chosen": messages[-1:] + more, "rejected": other}
        if kind == "implicit chat pair":
            messages = self.turns(some)
            return {"chosen": messages, "rejected": [*messages[:-1], {"role": "assistant", "content": self.text(1)}]}
        if kind == "scored":
            return {"prompt": self.text(), "completions": [self.text(1) for _ in range(3)], "rewards": [0, 2, 1]}
        if kind == "unpaired":
            return {"prompt": self.text(), "completion": self.text(1), "label": self.random.random() < 0.5}
        if kind == "chat unpaired":
            return {"messages": self.turns(some), "label": self.random.random() < 0.5}
        if kind == "prompt":
            return {"prompt": "x" + self.text(), "answer": "2"}
        if kind == "chat prompt":
            return {"prompt": self.turns(some)[:-1]}
        return {"messages": self.turns(some)[: -1 if self.random.random() < 0.5 else None]}  # "open prompt"

    def rows(self, kind, count):
        return [self.row(kind) for _ in range(count)]


PLAIN = {
    "text": (PretrainDataModule, {}),
    "demonstration": (SFTDataModule, {}),
    "pair": (PreferenceDataModule, {}),
    "implicit pair": (PreferenceDataModule, {}),
    "scored": (PreferenceDataModule, {}),
    "unpaired": (UnpairedDataModule, {}),
    "prompt": (PromptDataModule, {}),
}
CHATS = {
    "messages": (SFTDataModule, {}),
    "marked messages": (SFTDataModule, {"loss_on": "last_turn"}),
    "called": (SFTDataModule, {}),
    "chat demonstration": (SFTDataModule, {"max_length": 40}),
    "chat pair": (PreferenceDataModule, {}),
    "implicit chat pair": (PreferenceDataModule, {"max_length": 60}),
    "chat unpaired": (UnpairedDataModule, {}),
    "chat prompt": (PromptDataModule, {}),
    "open prompt": (PromptDataModule, {"overflow": "drop", "max_length": 100}),
}
TOKENIZERS = {
    "byte": lambda: make(None),
    "byte level": cache(byte_level),
    "byte level, first": cache(partial(byte_level, first="<bos>", last="<eos>")),
    **{f"prefix space, {scheme}": partial(prefix_space, scheme) for scheme in ("legacy", "first", "never")},
}
# As reasoning models do: the last reply gets an empty thought, which earlier replies lose again; and calls are shown.
REWRITES = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] | trim }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHOWN = {
    "mistral": MISTRAL,
    "plain": "plain",
    "chatml": STYLES["chatml"][0],
    "markers": STYLES["markers"][0],
    "rewrites": REWRITES,
    "calls": REWRITES.replace("<think></think>", ""),
}


def cases():
    """Name, kind of rows, tokenizer and options of every combination."""
    for name, build in TOKENIZERS.items():
        for kind in PLAIN:
            yield f"{name} | {kind}", kind, build, {}
        for template, text in SHOWN.items():
            for kind in CHATS:
                yield f"{name} | {template} | {kind}", kind, build, {"chat_template": text}
    for style, (template, special, plain, eos, *_) in STYLES.items():
        for kind in CHATS:
            yield f"style {style} | {kind}", kind, partial(make, template, special, plain, eos), {}


def outcome(kind, build, options, count=16):
    """A checksum of all that a table's rows hold, or which row was refused."""
    module, own = (PLAIN | CHATS)[kind]
    data = module(train=Rows(0).rows(kind, count), tokenizer=build(), shuffle=False, **own, **options)
    try:
        data.setup("fit")
    except ValueError as error:
        return f"refused {re.search(r'row [0-9]+', str(error)).group()}"
    table, checksum = data.train_dataloader().dataset, 0
    for row in map(table.row, range(len(table))):
        for name in sorted(row):
            value = row[name]
            plain = [str(value.dtype), value.tolist()] if hasattr(value, "tolist") else value
            checksum = zlib.crc32(json.dumps([name, plain]).encode(), checksum)
    return f"{len(table)} rows {checksum:08x}"
