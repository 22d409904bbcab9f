"""The work that both libraries are timed on: a Llama of one of two sizes, a tokenizer, four JSONL files.

Everything is written once, to a folder that both sides load, so weights, text and order of the rows are the same for
both. The text is random words of a word-level vocabulary (word `w17` is one token), so a row's number of tokens is
known without a tokenizer, and one counting rule serves both libraries:

- SFT, KTO: the real tokens of the rows of a step, prompt + completion + end of sequence (KTO's mismatched pairs, which
  are computed beside them, are not counted);
- DPO, ORPO, reward model: the real tokens of both sequences of each pair, prompt + chosen + eos and prompt + rejected +
  eos;
- GRPO, RLOO, online DPO: prompt + completion tokens of each of the step's samples (`num_tokens` of TRL); completions
  also alone.

Run `python benchmarks/workload.py FOLDER` to look at the files and at their statistics.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 2
STEPS = 64  # rows are written for this many optimizer steps

PAD, EOS, UNK = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
MODEL: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
LARGER = {  # the shape of SmolLM-135M
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


@dataclass(frozen=True)
class Size:
    """A model, by the keys of its configuration, and the rows of an optimizer step: sequences, pairs or prompts."""

    model: dict[str, Any]
    batch: dict[str, int]


ONLINE_7M = {"rloo": 4, "online_dpo": 4}
ONLINE_135M = {"rloo": 2, "online_dpo": 2}
SIZES = {
    "7m": Size(MODEL, {"sft": 8, "dpo": 4, "grpo": 4, "kto": 8, "reward": 4, "orpo": 4, **ONLINE_7M}),
    "135m": Size(MODEL | LARGER, {"sft": 4, "dpo": 2, "grpo": 2, "kto": 4, "reward": 2, "orpo": 2, **ONLINE_135M}),
}
METHODS = tuple(SIZES["7m"].batch)
ROWS = {"reward": "dpo", "orpo": "dpo", "rloo": "grpo", "online_dpo": "grpo"}  # methods that train on another's rows
GROUP = 8  # GRPO samples per prompt
GROUPS = {"grpo": GROUP, "rloo": GROUP, "online_dpo": 2}  # of the methods that sample
EOS_PROBABILITY = 1 / 64  # per token, under the initial weights: completion lengths are geometric, cut at 128
MAX_COMPLETION = 128  # completion limit, tokens
MAX_LENGTH = 1024  # longest row either library accepts, tokens; no row of the workload comes near it

LEARNING_RATE = {"sft": 1e-4, "dpo": 1e-5, "grpo": 1e-5, "kto": 1e-5, "reward": 1e-5, "orpo": 1e-5}
LEARNING_RATE |= {"rloo": 1e-5, "online_dpo": 1e-5}
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
MAX_GRAD_NORM = 1.0
BETA = 0.1  # of DPO, KTO, ORPO and online DPO
LORA = {"r": 16, "alpha": 32}  # on all linear maps but the head
SEED = 7

# mean and spread (standard deviation of the logarithm) of the lognormal lengths, tokens
PAIRS = ((200, 0.4), (80, 0.4))
LENGTHS = {"sft": ((120, 0.5), (80, 0.5)), "dpo": PAIRS, "grpo": ((100, 0.3), None), "kto": PAIRS}


class Text:
    """Random words with Zipf-like frequencies, so that the losses have something to learn."""

    def __init__(self, seed: int, vocabulary: int) -> None:
        self.generator = np.random.default_rng([SEED, seed])
        words = vocabulary - len(SPECIAL_TOKENS)
        weight = 1.0 / (np.arange(words) + 20.0)
        self.probabilities = weight / weight.sum()

    def length(self, mean: float, spread: float, longest: int = 400) -> int:
        """A lognormal length of the given mean, at least 2 and at most `longest` tokens."""
        value = self.generator.lognormal(np.log(mean) - spread**2 / 2, spread)
        return int(np.clip(round(value), 2, longest))

    def words(self, count: int) -> str:
        """`count` words separated by blanks."""
        return " ".join(f"w{i}" for i in self.generator.choice(len(self.probabilities), count, p=self.probabilities))


def make_rows(method: str, size: str) -> list[dict[str, Any]]:
    """The rows of a method of `LENGTHS`, in training order.

    They are `sft` (prompt, completion), `dpo` (prompt, chosen, rejected), `grpo` (prompt) and `kto` (prompt,
    completion, label: good and bad in turn). Completions begin with a blank, so that `prompt + completion` is what a
    user would write; the end-of-sequence token is left to the libraries.
    """
    text = Text(METHODS.index(method), SIZES[size].model["vocab_size"])
    prompt, completion = LENGTHS[method]
    names = {"dpo": ["chosen", "rejected"], "grpo": []}.get(method, ["completion"])
    rows = []
    for number in range(STEPS * SIZES[size].batch[method]):
        row: dict[str, Any] = {"prompt": text.words(text.length(*prompt))}
        for name in names:
            row[name] = " " + text.words(text.length(*completion))
        rows.append(row | {"label": number % 2 == 0} if method == "kto" else row)
    return rows


def make_prompts(size: str, tokens: int, count: int) -> list[list[int]]:
    """Token ids of prompts of a mean length, spread as those of GRPO are and at most twice as long."""
    text = Text(len(METHODS), SIZES[size].model["vocab_size"])
    lengths = [text.length(tokens, LENGTHS["grpo"][0][1], 2 * tokens) for _ in range(count)]
    return [[int(word[1:]) + len(SPECIAL_TOKENS) for word in text.words(length).split()] for length in lengths]


def row_tokens(row: dict[str, Any]) -> int:
    """Real tokens of a row that training reads, by the rule in the module's docstring (GRPO: the prompt once)."""
    count = {name: len(value.split()) for name, value in row.items() if isinstance(value, str)}
    if "completion" in row:
        return count["prompt"] + count["completion"] + 1
    if "chosen" in row:
        return 2 * count["prompt"] + count["chosen"] + count["rejected"] + 2
    return count["prompt"]


def step_tokens(rows: Sequence[dict[str, Any]], method: str, size: str) -> list[int]:
    """Real tokens of each optimizer step; where it samples the prompts' part alone (each prompt once per sample)."""
    count = SIZES[size].batch[method]
    repeat = GROUPS.get(method, 1)
    return [repeat * sum(map(row_tokens, rows[i : i + count])) for i in range(0, len(rows), count)]


def padding_share(rows: Sequence[dict[str, Any]], size: str) -> float:
    """Share of padding if each step's SFT rows are padded to the longest."""
    lengths = np.array([row_tokens(row) for row in rows]).reshape(-1, SIZES[size].batch["sft"])
    return float(1 - lengths.sum() / (lengths.max(1) * lengths.shape[1]).sum())


def even_words(completions: list[str], **_: Any) -> list[float]:
    """The reward of both libraries: even-numbered words per thousand words; -100 for no word at all.

    Continuous, so that almost no group is without a signal and neither library can skip work. Per thousand, so that the
    1e-4 which TRL adds to a group's standard deviation is lost in rounding: advantages do not depend on the unit.
    """
    scores = []
    for completion in completions:
        words = [word for word in completion.split() if word[:1] == "w"]
        even = sum(int(word[1:]) % 2 == 0 for word in words)
        scores.append(1000 * even / len(words) if words else -100.0)
    return scores


def fixed_completions(step: int, size: str, method: str = "grpo") -> list[list[int]]:
    """Token ids of a step's completions, prompt 0's first: what both libraries are given in a check.

    Lengths are geometric and cut at `MAX_COMPLETION`; a completion that is not cut ends with the end-of-sequence token.
    """
    generator = np.random.default_rng([SEED, 1000 + step])
    vocabulary = SIZES[size].model["vocab_size"]
    completions = []
    for _ in range(SIZES[size].batch[method] * GROUPS[method]):
        length = int(generator.geometric(EOS_PROBABILITY))
        ids = generator.integers(len(SPECIAL_TOKENS), vocabulary, min(length, MAX_COMPLETION)).tolist()
        if length <= MAX_COMPLETION:
            ids[-1] = EOS
        completions.append(ids)
    return completions


def fixed_rewards(step: int, size: str, method: str = "grpo") -> list[float]:
    """`even_words` of `fixed_completions(step, size, method)`, computed from the ids."""
    texts = [
        " ".join(f"w{i - len(SPECIAL_TOKENS)}" for i in ids if i >= len(SPECIAL_TOKENS))
        for ids in fixed_completions(step, size, method)
    ]
    return even_words(texts)


def write_tokenizer(folder: Path, words: int) -> None:
    """A word-level tokenizer: blank-separated words, `w0` has id 3; decoding joins with blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    vocabulary |= {f"w{i}": i + len(SPECIAL_TOKENS) for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[PAD],
        eos_token=SPECIAL_TOKENS[EOS],
        unk_token=SPECIAL_TOKENS[UNK],
        model_max_length=MODEL["max_position_embeddings"],
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def write_model(folder: Path, config: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """A Llama with random weights that ends its completions after a geometric number of tokens.

    Hidden dimension 0 is kept for the end of the sequence: every token enters with the same value there, no layer
    writes to it, so the final state has a positive component that the tied head multiplies with each token's own value.
    The end-of-sequence token's value is then set so that its mean probability on the SFT text is `EOS_PROBABILITY`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    embedding = model.model.embed_tokens.weight
    with torch.no_grad():
        embedding.normal_(0.0, 0.06)
        embedding[:, 0] = 0.1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        embedding[PAD] = 0.0
        embedding[UNK] = 0.0
        embedding[PAD, 0] = embedding[UNK, 0] = -20.0  # never sampled

        ids = [[int(w[1:]) + len(SPECIAL_TOKENS) for w in (r["prompt"] + r["completion"]).split()] for r in rows]
        states = torch.cat([model.model(torch.tensor([row])).last_hidden_state[0] for row in ids])
        logits = (states @ embedding.T).double()
        logits[:, EOS] = -torch.inf
        others = logits.logsumexp(-1)
        rest = (states[:, 1:] @ embedding[EOS, 1:]).double()
        low, high = 0.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            mean = torch.sigmoid(middle * states[:, 0].double() + rest - others).mean().item()
            low, high = (middle, high) if mean < EOS_PROBABILITY else (low, middle)
        embedding[EOS, 0] = low
    model.generation_config.do_sample = True
    model.save_pretrained(folder)


def draw_fresh(model: Any) -> None:
    """Draws anew, by their names, the weights that each library would draw for itself: adapters' `A`, a scalar head."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    fresh = {n: p for n, p in model.named_parameters() if ("lora_A" in n or "score" in n) and p.requires_grad}
    with torch.no_grad():
        for name in sorted(fresh):
            fresh[name].normal_(0.0, fresh[name].shape[1] ** -0.5, generator=generator)


def prepare(folder: str | os.PathLike[str], size: str) -> Path:
    """Write `model/` (with tokenizer) and each method's rows to `folder/size`, unless they are there; returns that."""
    target, config = Path(folder) / size, SIZES[size].model
    stamp = target / "workload.json"
    if is_ready(target):
        return target
    target.mkdir(parents=True, exist_ok=True)
    for method in LENGTHS:
        lines = [json.dumps(row) for row in make_rows(method, size)]
        (target / f"{method}.jsonl").write_text("\n".join(lines) + "\n")
    write_tokenizer(target / "model", config["vocab_size"] - len(SPECIAL_TOKENS))
    write_model(target / "model", config, make_rows("sft", size)[:16])
    stamp.write_text(json.dumps({"version": VERSION, "model": config, "seed": SEED}, indent=1))
    return target


def is_ready(target: Path) -> bool:
    """Whether this version's workload is in a folder."""
    stamp = target / "workload.json"
    return stamp.exists() and json.loads(stamp.read_text())["version"] == VERSION


def rows_file(folder: Path, method: str) -> Path:
    """Where a method's rows are."""
    return folder / f"{ROWS.get(method, method)}.jsonl"


def load_rows(folder: Path, method: str, steps: int) -> list[dict[str, Any]]:
    """The first `steps` optimizer steps' rows of a method, of the size that the folder is named by.

    Raises:
        ValueError: more steps are asked for than were written.
    """
    if not 0 < steps <= STEPS:
        raise ValueError(f"steps={steps}: the workload has 1 to {STEPS} steps")
    with open(rows_file(folder, method)) as lines:
        return [json.loads(line) for line in lines][: steps * SIZES[folder.name].batch[method]]


def main() -> None:
    """Write the files and print what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="runs/benchmark")
    parser.add_argument("--size", choices=SIZES, default="7m")
    options = parser.parse_args()
    folder, size = prepare(options.folder, options.size), options.size
    for method in LENGTHS:
        tokens = step_tokens(load_rows(folder, method, STEPS), method, size)
        print(f"{method}: {STEPS} steps, tokens per step mean {np.mean(tokens):.0f}, {min(tokens)} to {max(tokens)}")
    print(f"sft padding share {padding_share(load_rows(folder, 'sft', STEPS), size):.1%}")
    lengths = [len(ids) for step in range(STEPS) for ids in fixed_completions(step, size)]
    cut = np.mean(np.array(lengths) == MAX_COMPLETION)
    print(f"fixed completions: mean {np.mean(lengths):.1f} tokens, {cut:.1%} at the limit")


if __name__ == "__main__":
    main()
