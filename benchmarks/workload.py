"""The work that both libraries are timed on: one small Llama, one tokenizer, three JSONL files.

Everything is written once, to a folder that both sides load, so weights, text and order of the rows are the same for
both. The text is random words of a word-level vocabulary (word `w17` is one token), so a row's number of tokens is
known without a tokenizer, and one counting rule serves both libraries:

- SFT: the real tokens of the rows of a step, prompt + completion + end of sequence;
- DPO: the real tokens of both sequences of each pair, prompt + chosen + eos and prompt + rejected + eos;
- GRPO: prompt + completion tokens of each of the step's samples (`num_tokens` of TRL); completions also alone.

Run `python benchmarks/workload.py FOLDER` to look at the files and at their statistics.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1
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
EOS_PROBABILITY = 1 / 64  # per token, under the initial weights: completion lengths are geometric, cut at 128
GROUP = 8  # GRPO samples per prompt
MAX_COMPLETION = 128  # GRPO completion limit, tokens
MAX_LENGTH = 1024  # longest row either library accepts, tokens; no row of the workload comes near it

BATCH = {"sft": 8, "dpo": 4, "grpo": 4}  # rows per optimizer step: sequences, pairs, prompts
LEARNING_RATE = {"sft": 1e-4, "dpo": 1e-5, "grpo": 1e-5}
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
MAX_GRAD_NORM = 1.0
DPO_BETA = 0.1
SEED = 7

# mean and spread (standard deviation of the logarithm) of the lognormal lengths, tokens
LENGTHS = {"sft": ((120, 0.5), (80, 0.5)), "dpo": ((200, 0.4), (80, 0.4)), "grpo": ((100, 0.3), None)}


class Text:
    """Random words with Zipf-like frequencies, so that the losses have something to learn."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng([SEED, seed])
        words = MODEL["vocab_size"] - len(SPECIAL_TOKENS)
        weight = 1.0 / (np.arange(words) + 20.0)
        self.probabilities = weight / weight.sum()

    def length(self, mean: float, spread: float) -> int:
        """A lognormal length of the given mean, at least 2 and at most 400 tokens."""
        value = self.generator.lognormal(np.log(mean) - spread**2 / 2, spread)
        return int(np.clip(round(value), 2, 400))

    def words(self, count: int) -> str:
        """`count` words separated by blanks."""
        return " ".join(f"w{i}" for i in self.generator.choice(len(self.probabilities), count, p=self.probabilities))


def make_rows(method: str) -> list[dict[str, str]]:
    """The rows of `sft` (prompt, completion), `dpo` (prompt, chosen, rejected) or `grpo` (prompt), in training order.

    Completions begin with a blank, so that `prompt + completion` is what a user would write; the end-of-sequence token
    is left to the libraries.
    """
    text = Text(list(BATCH).index(method))
    prompt, completion = LENGTHS[method]
    names = {"sft": ["completion"], "dpo": ["chosen", "rejected"], "grpo": []}[method]
    rows = []
    for _ in range(STEPS * BATCH[method]):
        row = {"prompt": text.words(text.length(*prompt))}
        for name in names:
            row[name] = " " + text.words(text.length(*completion))
        rows.append(row)
    return rows


def row_tokens(row: dict[str, str]) -> int:
    """Real tokens of a row that training reads, by the rule in the module's docstring (GRPO: the prompt once)."""
    count = {name: len(value.split()) for name, value in row.items() if isinstance(value, str)}
    if "completion" in row:
        return count["prompt"] + count["completion"] + 1
    if "chosen" in row:
        return 2 * count["prompt"] + count["chosen"] + count["rejected"] + 2
    return count["prompt"]


def step_tokens(rows: Sequence[dict[str, str]], method: str) -> list[int]:
    """Real tokens of each optimizer step; for GRPO the prompts' part alone (each prompt once per sample)."""
    size = BATCH[method]
    repeat = GROUP if method == "grpo" else 1
    return [repeat * sum(map(row_tokens, rows[i : i + size])) for i in range(0, len(rows), size)]


def padding_share(rows: Sequence[dict[str, str]]) -> float:
    """Share of padding if each step's SFT rows are padded to the longest."""
    lengths = np.array([row_tokens(row) for row in rows]).reshape(-1, BATCH["sft"])
    return float(1 - lengths.sum() / (lengths.max(1) * BATCH["sft"]).sum())


def even_words(completions: list[str], **_: Any) -> list[float]:
    """The GRPO reward of both libraries: even-numbered words per thousand words; -100 for no word at all.

    Continuous, so that almost no group is without a signal and neither library can skip work. Per thousand, so that the
    1e-4 which TRL adds to a group's standard deviation is lost in rounding: advantages do not depend on the unit.
    """
    scores = []
    for completion in completions:
        words = [word for word in completion.split() if word[:1] == "w"]
        even = sum(int(word[1:]) % 2 == 0 for word in words)
        scores.append(1000 * even / len(words) if words else -100.0)
    return scores


def fixed_completions(step: int) -> list[list[int]]:
    """Token ids of `BATCH["grpo"] * GROUP` completions, prompt 0's first: what both libraries are given in a check.

    Lengths are geometric and cut at `MAX_COMPLETION`; a completion that is not cut ends with the end-of-sequence token.
    """
    generator = np.random.default_rng([SEED, 1000 + step])
    completions = []
    for _ in range(BATCH["grpo"] * GROUP):
        length = int(generator.geometric(EOS_PROBABILITY))
        ids = generator.integers(len(SPECIAL_TOKENS), MODEL["vocab_size"], min(length, MAX_COMPLETION)).tolist()
        if length <= MAX_COMPLETION:
            ids[-1] = EOS
        completions.append(ids)
    return completions


def fixed_rewards(step: int) -> list[float]:
    """`even_words` of `fixed_completions(step)`, computed from the ids."""
    texts = [
        " ".join(f"w{i - len(SPECIAL_TOKENS)}" for i in ids if i >= len(SPECIAL_TOKENS))
        for ids in fixed_completions(step)
    ]
    return even_words(texts)


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer: blank-separated words, `w0` has id 3; decoding joins with blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    vocabulary |= {f"w{i}": i + len(SPECIAL_TOKENS) for i in range(MODEL["vocab_size"] - len(SPECIAL_TOKENS))}
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


def write_model(folder: Path, rows: Sequence[dict[str, str]]) -> None:
    """A Llama with random weights that ends its completions after a geometric number of tokens.

    Hidden dimension 0 is kept for the end of the sequence: every token enters with the same value there, no layer
    writes to it, so the final state has a positive component that the tied head multiplies with each token's own value.
    The end-of-sequence token's value is then set so that its mean probability on the SFT text is `EOS_PROBABILITY`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).eval()
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


def prepare(folder: str | os.PathLike[str]) -> Path:
    """Write `model/` (with tokenizer), `sft.jsonl`, `dpo.jsonl`, `grpo.jsonl` to `folder`, unless they are there."""
    target = Path(folder)
    stamp = target / "workload.json"
    if stamp.exists() and json.loads(stamp.read_text())["version"] == VERSION:
        return target
    target.mkdir(parents=True, exist_ok=True)
    for method in BATCH:
        lines = [json.dumps(row) for row in make_rows(method)]
        (target / f"{method}.jsonl").write_text("\n".join(lines) + "\n")
    write_tokenizer(target / "model")
    write_model(target / "model", make_rows("sft")[:16])
    stamp.write_text(json.dumps({"version": VERSION, "model": MODEL, "seed": SEED}, indent=1))
    return target


def load_rows(folder: Path, method: str, steps: int) -> list[dict[str, str]]:
    """The first `steps` optimizer steps' rows of a method.

    Raises:
        ValueError: more steps are asked for than were written.
    """
    if not 0 < steps <= STEPS:
        raise ValueError(f"steps={steps}: the workload has 1 to {STEPS} steps")
    with open(folder / f"{method}.jsonl") as lines:
        return [json.loads(line) for line in lines][: steps * BATCH[method]]


def main() -> None:
    """Write the files and print what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="runs/benchmark")
    folder = prepare(parser.parse_args().folder)
    for method in BATCH:
        tokens = step_tokens(load_rows(folder, method, STEPS), method)
        print(f"{method}: {STEPS} steps, tokens per step mean {np.mean(tokens):.0f}, {min(tokens)} to {max(tokens)}")
    print(f"sft padding share {padding_share(load_rows(folder, 'sft', STEPS)):.1%}")
    lengths = [len(ids) for step in range(STEPS) for ids in fixed_completions(step)]
    cut = np.mean(np.array(lengths) == MAX_COMPLETION)
    print(f"fixed completions: mean {np.mean(lengths):.1f} tokens, {cut:.1%} at the limit")


if __name__ == "__main__":
    main()
