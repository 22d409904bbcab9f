"""What preparing a data set costs, ours against TRL: processor time a row, the same file, the same tokenizer.

    python -m venv .venv-trl && .venv-trl/bin/pip install -e .[trl]
    python benchmarks/tokenising.py --trl-python .venv-trl/bin/python

Every measurement is a process of its own that prepares a small file first, so that imports and what is compiled once do
not count, and then the large one: for ours `prepare_data` and `setup` of a data module, for TRL `load_dataset` and the
trainer's constructor with a model of two tiny layers. Counted is the processor time of the process, its threads and
its children. Libraries take turns, round by round; printed are medians with their ranges and the ratio within each
round. Without `--trl-python` ours alone is measured.

The text is sentences of made-up words in Zipf's frequencies, the tokenizer a byte-level BPE trained on them, its
template ChatML. Three of four plain prompts end with a blank, which a text of prompt and completion would hold in
another token than the prompt has alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CASES = ("sft", "sft chat", "sft messages", "preference", "preference chat", "prompts", "prompts chat")
OURS_ALONE = ("prompts", "prompts chat")  # TRL has no such preparation: it tokenises prompts step by step
MARK = "RESULT "
SPECIAL = ("<eos>", "<pad>", "<|im_start|>", "<|im_end|>")
TURN = "<|im_start|>{{ m['role'] }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{{ m['content'] }}<|im_end|>\n{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}" + TURN + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}" + PROMPT
)


class Text:
    """Sentences of made-up words.

    Args:
        seed: What is drawn.
    """

    def __init__(self, seed: int) -> None:
        syllables = [a + b for a in ("b", "d", "k", "l", "m", "n", "r", "s", "st", "t", "v") for b in "aeiou"]
        drawn = np.random.default_rng(0)
        self.words = ["".join(drawn.choice(syllables, drawn.integers(1, 5))) for _ in range(8000)]
        weight = np.cumsum(1 / (np.arange(len(self.words)) + 10))
        self.generator, self.below = np.random.default_rng(seed), weight / weight[-1]

    def write(self, words: int) -> str:
        """About that many words."""
        found = []
        while words > 0:
            count = int(self.generator.integers(4, 14))
            drawn = np.searchsorted(self.below, self.generator.random(count))
            sentence = " ".join(self.words[i] for i in drawn)
            found.append(sentence.capitalize() + ("." if self.generator.random() < 0.8 else " 12"))
            words -= count
        return " ".join(found)

    def length(self, mean: int) -> int:
        """A lognormal length."""
        return max(4, int(self.generator.lognormal(np.log(mean), 0.5)))


def row(text: Text, case: str) -> dict[str, Any]:
    """One row of a case, about 90 words of one reply."""
    kind, _, form = case.partition(" ")
    ask, replies = text.write(text.length(25)), [text.write(text.length(50)) for _ in range(2)]
    if form == "" and text.generator.random() < 0.75:
        ask += (
            " Answer: "  # the blank is a token of its own, but part of the completion's first where both are one text
        )
    if form == "messages":
        turns = [ask, replies[0], text.write(8), replies[1]]
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}
    names = {"sft": ["completion"], "preference": ["chosen", "rejected"], "prompts": []}[kind]
    found = {"prompt": ask, **dict(zip(names, replies, strict=False))}
    if form == "chat":
        return {n: [{"role": "user" if n == "prompt" else "assistant", "content": t}] for n, t in found.items()}
    return found | ({"answer": replies[0]} if kind == "prompts" else {})


def prepare(folder: Path, case: str, rows: int) -> Path:
    """Writes a case's file, unless it is there."""
    path = folder / f"{case.replace(' ', '_')}-{rows}.jsonl"
    if not path.exists():
        text = Text(rows)
        path.write_text("".join(json.dumps(row(text, case)) + "\n" for _ in range(rows)), encoding="utf-8")
    return path


def write_tokenizer(folder: Path, words: int = 300_000) -> None:
    """A byte-level BPE of at most 8,000 tokens, learnt from a number of words, unless it is there."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        return
    backend, text = Tokenizer(models.BPE()), Text(0)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn = trainers.BpeTrainer(
        vocab_size=8000, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    backend.train_from_iterator((text.write(100) for _ in range(words // 100)), learn)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)


def write_model(folder: Path) -> None:
    """The tiny model that a trainer of TRL's asks for, unless it is there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if not (folder / "config.json").exists():
        LlamaForCausalLM(LlamaConfig(vocab_size=8000, **shape)).save_pretrained(folder)


def load_tokenizer(folder: Path, case: str) -> Any:
    """The tokenizer with the template of a case."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MARKED if case.endswith("messages") else CHATML
    return tokenizer


def processor_time() -> float:
    """Seconds of this process, its threads and the children that ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def ours(path: Path, case: str, folder: Path) -> int:
    """Prepares a file with a data module; its rows."""
    from datamodules import PreferenceDataModule, PromptDataModule, SFTDataModule

    modules = {"sft": SFTDataModule, "preference": PreferenceDataModule, "prompts": PromptDataModule}
    data = modules[case.split()[0]](train=str(path), tokenizer=load_tokenizer(folder / "tokenizer", case), cache=None)
    data.prepare_data()
    data.setup("fit")
    return len(data.train_dataloader().dataset)


def trl(path: Path, case: str, folder: Path) -> int:
    """Prepares a file with a trainer of TRL's; its rows."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        common = {"output_dir": cache, "report_to": "none", "use_cpu": True, "bf16": False}
        if case.startswith("preference"):
            trainer, arguments = DPOTrainer, DPOConfig(**common)
        else:
            trainer, arguments = SFTTrainer, SFTConfig(**common, assistant_only_loss=case.endswith("messages"))
        tokenizer = load_tokenizer(folder / "tokenizer", case)
        model = str(folder / "model")
        return len(trainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer).train_dataset)


def measure(options: argparse.Namespace) -> None:
    """Prepares a small file, then the large one; prints the processor time of the latter, in seconds."""
    run = {"ours": ours, "trl": trl}[options.measure]
    folder, (case,) = Path(options.folder), options.cases
    run(prepare(folder, case, 64), case, folder)
    path, before = prepare(folder, case, options.rows), processor_time()
    kept = run(path, case, folder)
    print(MARK + json.dumps({"seconds": processor_time() - before, "rows": kept}), flush=True)


def execute(library: str, case: str, options: argparse.Namespace) -> float:
    """Milliseconds of processor time a row, from a process of its own."""
    python = options.trl_python if library == "trl" else sys.executable
    words = [python, __file__, "--measure", library, "--cases", case]
    words += ["--folder", options.folder, "--rows", str(options.rows)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return 1000 * json.loads(line.removeprefix(MARK))["seconds"] / options.rows
    raise SystemExit(f"{words} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def table(options: argparse.Namespace) -> Iterator[str]:
    """Measures, a case a line."""
    yield f"| case, {options.rows:,} rows | ours, ms a row | TRL, ms a row | ours / TRL |"
    yield "|---|---|---|---|"
    for case in options.cases:
        libraries = ["ours", "trl"] if options.trl_python and case not in OURS_ALONE else ["ours"]
        rounds = [{name: execute(name, case, options) for name in libraries} for _ in range(options.rounds)]
        own = [found["ours"] for found in rounds]
        other = [found["trl"] for found in rounds if "trl" in found]
        ratio = [a / b for a, b in zip(own, other, strict=False)]
        columns = [spread(values) if values else "" for values in (own, other, ratio)]
        yield f"| {case} | {' | '.join(columns)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default="runs/tokenising", help="where the files are, or are written")
    parser.add_argument("--words", type=int, default=300_000, help="words that the tokenizer is trained on")
    parser.add_argument("--trl-python", help="interpreter of the environment with TRL")
    parser.add_argument("--measure", choices=("ours", "trl"), help="measure one case in this process")
    options = parser.parse_args()
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer", options.words)
    if options.trl_python:
        write_model(folder / "model")
    if options.measure:
        measure(options)
        return
    for line in table(options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
