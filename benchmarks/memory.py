"""What a run holds by the size of its model and its method: estimated for large models, measured for a small one.

    python benchmarks/memory.py --estimate
    python benchmarks/memory.py --size 135m

The estimate counts weights, gradients, optimizer states and frozen models without reading a weight, as `align inspect`
does. The measurement takes two optimizer steps of a few tokens in a process of its own, in float32, and sets the most
that it holds beyond its imports against the estimate. Completions are given, so no sampler is in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import workload
from measure import MARK, measured_apart, peak_rss
from sft_memory import forget_peak

SHAPES: dict[str, dict[str, Any]] = {  # those of Qwen2.5
    "0.5B": {"hidden_size": 896, "layers": 24, "heads": (14, 2), "intermediate_size": 4864, "tied": True},
    "1.5B": {"hidden_size": 1536, "layers": 28, "heads": (12, 2), "intermediate_size": 8960, "tied": True},
    "7B": {"hidden_size": 3584, "layers": 28, "heads": (28, 4), "intermediate_size": 18944, "tied": False},
    "32B": {"hidden_size": 5120, "layers": 64, "heads": (40, 8), "intermediate_size": 27648, "tied": False},
}
WAYS: dict[str, dict[str, Any]] = {  # options of the policy
    "all weights, float32": {},
    "all weights, bfloat16": {"dtype": "bfloat16"},
    "LoRA, base in bfloat16": {"dtype": "bfloat16", "lora": workload.LORA},
    "LoRA, base in 4 bits": {"dtype": "bfloat16", "lora": workload.LORA, "quantization": "4bit"},
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # module, and its options
    "SFT": ("SFTModule", {}),
    "DPO": ("DPOModule", {}),
    "GRPO": ("GRPOModule", {}),
    "GRPO, `beta` 0.04": ("GRPOModule", {"beta": 0.04}),
    "PPO": ("PPOModule", {}),
    "PPO, `critic` shared": ("PPOModule", {"critic": "shared"}),
}
COLUMNS = {  # of the estimates: what stands for methods that hold as much
    "SFT, ORPO, CPO, GRPO": "SFT",
    "DPO, KTO, online DPO, GRPO with `beta`": "DPO",
    "PPO": "PPO",
    "PPO, `critic` shared": "PPO, `critic` shared",
}
MEASURED = {"all weights": {}, "LoRA": {"lora": workload.LORA}}


def never_called(completions: Sequence[str]) -> list[float]:
    """Stands for rewards, which the batch brings."""
    raise RuntimeError("the batch brings its rewards")


def make(method: str, policy: dict[str, Any]) -> Any:
    """The module of a method on a policy, whose options are given by name."""
    import torch

    import alignment_modules
    from alignment_modules.policies import LoraConfig, PolicyConfig

    name, options = METHODS[method]
    lora = None if policy.get("lora") is None else LoraConfig(**policy["lora"])
    if name in ("GRPOModule", "PPOModule"):
        options = {**options, "rewards": never_called}
    return getattr(alignment_modules, name)(
        policy=PolicyConfig(**{**policy, "lora": lora}),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-5),
        **options,
    )


def estimated(method: str, policy: dict[str, Any]) -> Any:
    """What `align inspect` would tell of the memory of a run."""
    from alignment_modules.cli.inspection.memory import measure_memory
    from alignment_modules.policies.weights import without_weights

    with without_weights():
        return measure_memory(make(method, policy))


def write_shape(folder: Path, size: str) -> Path:
    """A folder that has the configuration of a model, and no weights."""
    shape = SHAPES[size]
    heads, key_values = shape["heads"]
    folder.mkdir(exist_ok=True)
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": shape["hidden_size"],
        "num_hidden_layers": shape["layers"], "num_attention_heads": heads, "num_key_value_heads": key_values,
        "intermediate_size": shape["intermediate_size"], "tie_word_embeddings": shape["tied"],
        "vocab_size": 151_936 if shape["tied"] else 152_064,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def estimates(size: str, ways: Iterable[str] = WAYS) -> Iterator[str]:
    """The lines of the table for one size, GiB."""
    logging.getLogger("alignment_modules").setLevel(logging.ERROR)  # that there are no weights
    with tempfile.TemporaryDirectory() as made:
        folder = write_shape(Path(made), size)
        for way in ways:
            policy = {**WAYS[way], "path": str(folder)}
            found = [estimated(method, policy).total / 2**30 for method in COLUMNS.values()]
            yield f"| {size} | {way} | {' | '.join(f'{held:,.1f}' for held in found)} |"


def batch_of(method: str, rows: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    """Rows of a prompt and a completion (for DPO two) of as many tokens each; for SFT twice as many rows."""
    import torch

    def passage(name: str, count: int) -> dict[str, Any]:
        ids = torch.randint(3, vocabulary, (count, tokens))
        return {f"{name}input_ids": ids, f"{name}attention_mask": torch.ones_like(ids)}

    if method == "SFT":
        ids = torch.randint(3, vocabulary, (2 * rows, 2 * tokens))
        labels = torch.where(torch.arange(2 * tokens) < tokens, -100, ids)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if method == "DPO":
        return passage("prompt_", rows) | passage("chosen_", rows) | passage("rejected_", rows)
    prompts, responses = (torch.randint(3, vocabulary, (count, tokens)) for count in (rows, 2 * rows))
    masks = {"prompt_attention_mask": torch.ones_like(prompts), "response_mask": torch.ones_like(responses)}
    rewards = torch.arange(2 * rows) % 2
    return {"prompts": prompts, "responses": responses, "rewards": rewards.float(), **masks}


def config_of(size: str) -> dict[str, Any]:
    """The measured model's options."""
    return {"config": {"model_type": "llama", **workload.SIZES[size].model}}


def measured(arguments: argparse.Namespace) -> dict[str, float]:
    """The most that one method holds in the steps of this process, megabytes beyond its imports."""
    import lightning as L
    import peft  # noqa: F401  # so that the baseline is the same for each way
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    forget_peak()
    before = peak_rss()
    module = make(arguments.method, {**config_of(arguments.size), **MEASURED[arguments.way]})
    vocabulary = workload.SIZES[arguments.size].model["vocab_size"]
    batch = batch_of(arguments.method, arguments.rows, arguments.tokens, vocabulary)

    class FromTheFirstStep(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            forget_peak()

    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[FromTheFirstStep()],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 2, batch_size=None))
    return {"megabytes": peak_rss() - before}


def main() -> None:
    """Prints a table: of estimates, or of measurements beside them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimate", action="store_true", help="the table of large models")
    parser.add_argument("--size", choices=workload.SIZES, default="135m", help="shape, default: %(default)s")
    parser.add_argument("--rows", type=int, default=1, help="pairs of a step, default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt and of a completion, default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--method", choices=METHODS, help="measure one, in this process; with --way")
    parser.add_argument("--way", choices=MEASURED, help="measure one, in this process; with --method")
    arguments = parser.parse_args()
    if arguments.estimate:
        print(f"| size | trained | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}")
        for size in SHAPES:
            for line in estimates(size):
                print(line, flush=True)
        return
    if arguments.method:
        print(MARK + json.dumps(measured(arguments)))
        return
    print("| trained | method | estimate, MB | measured, MB | more, MB |\n|---|---|---|---|---|")
    for way, options in MEASURED.items():
        for method in METHODS:
            counted = estimated(method, {**config_of(arguments.size), **options}).total / 1e6
            held = measured_apart("--method", method, "--way", way)["megabytes"]
            print(f"| {way} | {method} | {counted:,.0f} | {held:,.0f} | {held - counted:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
