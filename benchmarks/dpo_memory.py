"""Peak memory of DPO by how the policy is trained and where the reference is.

    python benchmarks/dpo_memory.py

Each way takes two optimizer steps on the same pairs, in float32, in a process of its own. Prints what it needs beyond
the interpreter and its libraries, and what a checkpoint holds.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import workload
from measure import MARK, measured_apart, peak_rss

WAYS: dict[str, tuple[dict[str, Any] | None, str]] = {  # options of `lora`, and the reference
    "all weights, reference a copy": (None, "none"),
    "LoRA, reference with the adapters off": ({}, "none"),
    "LoRA, reference a model of its own": ({}, "whole"),
    "LoRA, reference another adapter on the base": ({}, "beside"),
    "rsLoRA, reference with the adapters off": ({"use_rslora": True}, "none"),
    "DoRA, reference with the adapters off": ({"use_dora": True}, "none"),
    "PiSSA, reference with the adapters off": ({"init": "pissa_niter_16"}, "none"),
}


def prepare(folder: Path, size: str) -> None:
    """Writes a model of random weights, and an adapter on it that does something."""
    import torch

    from alignment_modules import LoraConfig, PolicyConfig
    from alignment_modules.policies import build_policy
    from alignment_modules.policies.export import export_policy

    torch.manual_seed(0)
    config = {**workload.SIZES[size].model}
    export_policy(build_policy(PolicyConfig(config={"model_type": "llama", **config})), folder / "base")
    policy = build_policy(PolicyConfig(path=str(folder / "base"), lora=LoraConfig()))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    export_policy(policy, folder / "adapter", lora="adapter")


def measured(way: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """One way in this process: its peak memory and the size of its checkpoint, in megabytes."""
    import lightning as L
    import torch

    from alignment_modules import DPOModule, LoraConfig, PolicyConfig

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    before = peak_rss()
    lora, kind = WAYS[way]
    policy = PolicyConfig(path=str(folder / "base"), lora=None if lora is None else LoraConfig(**lora))
    reference = {
        "none": None,
        "whole": str(folder / "adapter"),
        "beside": PolicyConfig(path=str(folder / "adapter"), merge_adapter=False),
    }[kind]
    module = DPOModule(policy=policy, reference=reference, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-5))
    batch = {}
    vocabulary = workload.SIZES[arguments.size].model["vocab_size"]
    for side, width in (("prompt", arguments.tokens), ("chosen", arguments.tokens), ("rejected", arguments.tokens)):
        batch[f"{side}_input_ids"] = torch.randint(3, vocabulary, (arguments.pairs, width))
        batch[f"{side}_attention_mask"] = torch.ones(arguments.pairs, width, dtype=torch.long)
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 2, batch_size=None))
    peak = peak_rss() - before
    trainer.save_checkpoint(folder / "one.ckpt")
    return {"megabytes": peak, "checkpoint": (folder / "one.ckpt").stat().st_size / 1e6}


def main() -> None:
    """Measures every way and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=workload.SIZES, default="135m", help="shape, default: %(default)s")
    parser.add_argument("--pairs", type=int, default=2, help="of a step, default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt and of a completion, default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--way", choices=WAYS, help="measure one, in this process; with --folder")
    parser.add_argument("--folder", type=Path, help="of the model and the adapter, default: one that is made")
    arguments = parser.parse_args()
    if arguments.way:
        print(MARK + json.dumps(measured(arguments.way, arguments.folder, arguments)))
        return
    with tempfile.TemporaryDirectory() as made:
        prepare(Path(made), arguments.size)
        print("| | peak MB | checkpoint MB |\n|---|---|---|")
        for way in WAYS:
            result = measured_apart("--way", way, "--folder", made)
            print(f"| {way} | {result['megabytes']:,.0f} | {result['checkpoint']:,.1f} |", flush=True)


if __name__ == "__main__":
    main()
