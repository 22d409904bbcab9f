"""Peak memory and time of SFT with all weights, with LoRA, and with LoRA on a quantized base.

    python benchmarks/sft_memory.py --size 135m

Each way trains in a process of its own. Prints what its weights take, the most that the process holds in the steps
beyond what it held after its imports, and the seconds of a step. Loading is not in it: a folder is read in full
precision, a layer at a time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
import workload
from measure import MARK, measured_apart, peak_rss, rows_folder

WAYS: dict[str, dict[str, Any]] = {
    "all weights": {"adapters": False},
    "LoRA": {"adapters": True},
    "LoRA on 8bit": {"adapters": True, "quantization": "8bit"},
    "LoRA on int8_weight_only": {"adapters": True, "quantization": "int8_weight_only"},
    "LoRA on 4bit": {"adapters": True, "quantization": "4bit"},
}


def forget_peak() -> None:
    """Gives freed memory back to the system, and makes what is held now the peak (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def build(arguments: argparse.Namespace, folder: Path) -> Any:
    """The module of a way."""
    import torch

    from alignment_modules import SFTModule
    from alignment_modules.policies import LoraConfig, PolicyConfig

    way = WAYS[arguments.way]
    policy = PolicyConfig(
        path=str(folder / "model"),
        dtype=arguments.dtype,
        lora=LoraConfig(**workload.LORA) if way["adapters"] else None,
        quantization=way.get("quantization"),
        gradient_checkpointing=arguments.gradient_checkpointing,
    )
    return SFTModule(policy=policy, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-4))


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One way in this process."""
    # All that any way needs, so that the baseline is the same for each.
    import bitsandbytes  # noqa: F401
    import lightning as L
    import peft  # noqa: F401
    import torch
    import torchao  # noqa: F401
    import transformers  # noqa: F401

    import datamodules
    from alignment_modules.policies.quantization import bytes_of, stored_parts

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    torch.set_num_threads(arguments.threads)
    L.seed_everything(workload.SEED)
    data = datamodules.SFTDataModule(
        train=str(workload.rows_file(folder, "sft")),
        tokenizer=str(folder / "model"),
        batch_size=workload.SIZES[arguments.size].batch["sft"],
        max_length=workload.MAX_LENGTH,
        shuffle=False,
    )
    data.prepare_data()
    data.setup("fit")
    forget_peak()
    baseline = peak_rss()
    module = build(arguments, folder)
    for parameter in module.parameters():  # or the weights' whole file would stay mapped for the sake of a few of them
        if type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.clone()
    ends: list[float] = []

    class Clock(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            forget_peak()
            ends.append(time.perf_counter())

        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(accelerator="cpu", max_steps=arguments.steps, callbacks=[Clock()], **quiet).fit(module, datamodule=data)  # type: ignore[arg-type]
    held = {id(part): bytes_of(part) for p in module.policy.parameters() for part in stored_parts(p)}
    return {
        "weights": sum(held.values()) / 1e6,
        "trained": sum(p.numel() for p in module.policy.parameters() if p.requires_grad) / 1e6,
        "peak": peak_rss() - baseline,
        "seconds": (ends[-1] - ends[1]) / (len(ends) - 2),
    }


def main() -> None:
    """Measures every way and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=workload.SIZES, default="7m", help="of the model, default: %(default)s")
    parser.add_argument("--folder", default="runs/benchmark", help="where the workload is, or is written")
    parser.add_argument("--dtype", default="float32", help="of what is not quantized, default: %(default)s")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute each layer's activations")
    parser.add_argument("--steps", type=int, default=3, help="the first is not timed, default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--way", choices=WAYS, help="measure one, in this process")
    arguments = parser.parse_args()
    if arguments.way:
        print(MARK + json.dumps(measured(arguments, rows_folder(arguments))))
        return
    rows_folder(arguments)
    print("| SFT | weights, MB | trained, M | peak of the steps, MB | seconds a step |\n|---|---|---|---|---|")
    for way in WAYS:
        found = measured_apart("--way", way)
        numbers = f"{found['weights']:,.0f} | {found['trained']:.1f} | {found['peak']:,.0f} | {found['seconds']:.2f}"
        print(f"| {way} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
