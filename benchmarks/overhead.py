"""What the Trainer costs a step: `Trainer.fit` against a plain loop of the same objective, and where the time goes.

The model is so small (one layer of width 16) that a step is almost nothing but overhead, which does not depend on the
model's size. Time is this process's own processor time on one thread, so a busy machine disturbs it little. Printed for
each method: milliseconds per step of the plain loop, of a Lightning module that does nothing, of the Trainer without
logger and progress bar, and of the Trainer as `run_ours.py` uses it; then own time by package under cProfile.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import pstats
import statistics
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import measure
import run_ours
import torch
import workload
from torch.utils.data import DataLoader

OURS = ("alignment_modules", "datamodules")
PACKAGES = (*OURS, "lightning", "torch", "transformers", "torchmetrics", "tensorboard", "rich", "tqdm")


class Nothing(L.LightningModule):
    """The least a LightningModule can do: one parameter, one product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Something to differentiate."""
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the other modules."""
        return torch.optim.AdamW(self.parameters(), lr=0.0)


def write_tiny_model(folder: Path) -> None:
    """A one-layer Llama with the workload's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(**(workload.MODEL | sizes | {"num_key_value_heads": 1}))
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    workload.write_tokenizer(folder / "model", words=workload.MODEL["vocab_size"] - len(workload.SPECIAL_TOKENS))


def tiny_batch(method: str) -> dict[str, Any]:
    """A batch of a few tokens, in the format of the method."""
    generator = torch.Generator().manual_seed(0)

    def ids(rows: int, length: int = 4) -> torch.Tensor:
        return torch.randint(3, 60, (rows, length), generator=generator)

    if method == "sft":
        tokens = ids(2)
        return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    if method in ("dpo", "reward", "orpo", "kto"):
        sides = ("prompt", "completion") if method == "kto" else ("prompt", "chosen", "rejected")
        rows = {f"{name}_input_ids": ids(2) for name in sides}
        rows |= {key.replace("input_ids", "attention_mask"): torch.ones_like(row) for key, row in rows.items()}
        return rows | ({"label": torch.tensor([True, False])} if method == "kto" else {})
    batch = {"prompts": ids(1), "responses": ids(workload.GROUP), "rewards": torch.arange(float(workload.GROUP))}
    masks = {"prompt_attention_mask": "prompts", "response_mask": "responses"}
    return batch | {mask: torch.ones_like(batch[key]) for mask, key in masks.items()}


def per_step(options: argparse.Namespace, folder: Path, how: str) -> float:
    """Median milliseconds of processor time per step, after the warm-up."""
    clock = measure.StepClock(options.warmup, time.process_time)
    watch = run_ours.Watch(options, clock, measure.Profile(0))
    loader = DataLoader([tiny_batch(options.method)] * (options.warmup + options.steps), batch_size=None)  # type: ignore[arg-type]
    if how == "plain loop":
        run_ours.loop(run_ours.build_module(options, folder, bare=True), loader, options, watch)
    else:
        module = Nothing() if how == "empty module" else run_ours.build_module(options, folder)
        changes = {} if how == "as benchmarked" else {"logger": False, "enable_progress_bar": False}
        with contextlib.redirect_stdout(io.StringIO()):
            run_ours.fit(module, loader, options, watch, **changes)
    return 1000 * statistics.median(clock.seconds[options.warmup :])


def profile(options: argparse.Namespace, folder: Path) -> None:
    """Own time of the Trainer's run by package, and the costliest functions of Lightning and of this library."""
    module = run_ours.build_module(options, folder)
    clock = measure.StepClock(options.warmup)
    loader = DataLoader([tiny_batch(options.method)] * (options.warmup + options.steps), batch_size=None)  # type: ignore[arg-type]
    profiler = cProfile.Profile()
    watch = run_ours.Watch(options, clock, measure.Profile(0))
    with contextlib.redirect_stdout(io.StringIO()):
        profiler.runcall(run_ours.fit, module, loader, options, watch)
    steps = options.warmup + options.steps
    by_package: Counter[str] = Counter()
    rows = []
    for (file, line, name), (_, calls, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        package = next((p for p in PACKAGES if f"/{p}/" in file), "other Python" if file != "~" else "C code")
        by_package[package] += own  # type: ignore[assignment]
        if package in (*OURS, "lightning"):
            rows.append((own, calls, f"{package}/{file.split(f'/{package}/')[-1]}:{line} {name}"))
    print("  ".join(f"{name} {1000 * own / steps:.2f} ms" for name, own in by_package.most_common()))
    for own, calls, where in sorted(rows, reverse=True)[: options.rows]:
        print(f"  {1000 * own / steps:7.3f} ms/step {calls / steps:8.1f} calls/step  {where}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(workload.METHODS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=12, help="functions to list under cProfile; 0: no profile")
    options = parser.parse_args()
    options.variant, options.beta, options.check, options.lora = "default", 0.0, False, False
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options.folder = name
        write_tiny_model(folder)
        for method in options.methods:
            options.method = method
            ways = ("plain loop", "empty module", "Trainer, quiet", "as benchmarked")
            times: dict[str, list[float]] = {how: [] for how in ways}
            for _ in range(options.rounds):
                for how in ways:
                    times[how].append(per_step(options, folder, how))
            middle = {how: statistics.median(values) for how, values in times.items()}
            columns = "  ".join(f"{how} {value:.2f}" for how, value in middle.items())
            extra = middle["as benchmarked"] - middle["plain loop"]
            print(f"\n{method}, ms per step: {columns}; the Trainer adds {extra:.2f}", flush=True)
            if options.rows:
                profile(options, folder)


if __name__ == "__main__":
    main()
