"""What compiling the layers gives, and what recomputing them costs.

    python benchmarks/layers.py compiled sft dpo grpo --size 135m
    python benchmarks/layers.py recomputed --size 135m

`compiled` trains two policies of the same weights in one process, step by step in turn, one compiled. It prints the
median ratio of the processor time of a pair of steps after the warm-up, which hardly depends on what else the machine
does, how much longer on the clock the compiled warm-up took, and how far losses are apart. What is sampled is outside
the ratio: both sample alike.

`recomputed` trains SFT with each setting in processes of its own, round by round in turn. It prints the peak memory
beyond the imports, and the processor time of a step on one thread, against no checkpointing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import measure
import run_ours
import torch
import workload

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "2": {"gradient_checkpointing": 2},
    "selective": {"gradient_checkpointing": "selective"},
    "true": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
    "compiled, true": {"compile": True, "gradient_checkpointing": True},
}


class Side:
    """One of the two policies that are compared, and what it trains with."""

    def __init__(self, options: argparse.Namespace, folder: Path, *, compiled: bool) -> None:
        L.seed_everything(workload.SEED, verbose=False)
        self.method = options.method
        self.module = run_ours.build_module(options, folder, bare=True, compile=compiled).train()
        self.optimizer = self.module.configure_optimizers()
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.seconds: list[float] = []  # of this process's processor time
        self.wall: list[float] = []

    def step(self, batch: Any) -> None:
        """One optimizer step, timed without its sampling."""
        if self.method in workload.GROUPS:
            batch = self.module.roll_out(batch)
        began, started = time.process_time(), time.perf_counter()
        run_ours.update(self.module, self.optimizer, self.parameters, batch, self.method)
        self.seconds.append(time.process_time() - began)
        self.wall.append(time.perf_counter() - started)


def compare_compiled(options: argparse.Namespace) -> str:
    """One method's row of the table."""
    torch.set_num_threads(options.threads)
    folder = measure.rows_folder(options)
    data = run_ours.build_data(options, folder)
    data.prepare_data()
    data.setup("fit")
    eager, compiled = (Side(options, folder, compiled=compiled) for compiled in (False, True))
    for number, batch in zip(range(options.warmup + options.steps), data.train_dataloader(), strict=False):
        for side in (eager, compiled) if number % 2 else (compiled, eager):
            side.step(dict(batch))
        print(f"{options.method} {number}: {eager.seconds[-1]:.2f} {compiled.seconds[-1]:.2f}", file=sys.stderr)
    pairs = list(zip(eager.seconds, compiled.seconds, strict=True))
    ratios = [after / before for before, after in pairs[options.warmup :]]
    cold = sum(compiled.wall[: options.warmup]) - sum(eager.wall[: options.warmup])
    losses = [[float(loss) for loss, _ in side.module.steps] for side in (eager, compiled)]
    apart = max(abs(one - other) / abs(one) for one, other in zip(*losses, strict=True))
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    seconds = statistics.median(eager.seconds[options.warmup :])
    return f"| {options.method} | {seconds:.2f} | {middle:.2f} [{low:.2f}, {high:.2f}] | {cold:.0f} | {apart:.0e} |"


def run_recomputed(options: argparse.Namespace, setting: str) -> dict[str, float]:
    """One setting's memory and time, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("run_ours.py")), "sft", "--bare", "--threads", "1"]
    command += ["--clock", "cpu", "--size", options.size, "--folder", options.folder, "--steps", str(options.steps)]
    command += ["--warmup", str(options.warmup), "--policy", json.dumps(SETTINGS[setting])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.split(measure.MARK)[1])


def compare_recomputed(options: argparse.Namespace) -> None:
    """All settings, round by round."""
    found: dict[str, list[dict[str, float]]] = {setting: [] for setting in options.settings}
    for _ in range(options.rounds):
        for setting, results in found.items():
            results.append(run_recomputed(options, setting))
            print(setting, *(round(results[-1][key], 2) for key in ("seconds_median", "peak_mb")), file=sys.stderr)
    print("| setting | peak memory, MB | seconds | of no checkpointing's memory, time |\n|---|---|---|---|")
    plain: tuple[float, float] | None = None
    for setting, results in found.items():
        memory = statistics.median(result["peak_mb"] - result["baseline_mb"] for result in results)
        seconds = statistics.median(result["seconds_median"] for result in results)
        plain = plain or (memory, seconds)
        print(f"| {setting} | {memory:,.0f} | {seconds:.2f} | {memory / plain[0]:.2f}, {seconds / plain[1]:.2f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    compiled, recomputed = kinds.add_parser("compiled"), kinds.add_parser("recomputed")
    compiled.add_argument("methods", nargs="+", choices=workload.METHODS)
    compiled.add_argument("--lora", action="store_true", help=measure.LORA_HELP)
    compiled.add_argument("--threads", type=int, default=1)
    recomputed.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    recomputed.add_argument("--rounds", type=int, default=2)
    for kind in (compiled, recomputed):
        measure.add_workload(kind)
        kind.add_argument("--steps", type=int, default=6, help="measured optimizer steps")
        kind.add_argument("--warmup", type=int, default=3, help="optimizer steps before the measured ones")
    options = parser.parse_args()
    if options.kind == "recomputed":
        compare_recomputed(options)
        return
    head = "| method | seconds of a step, eager | compiled / eager | seconds of compiling | losses apart |"
    rows = [
        compare_compiled(argparse.Namespace(**vars(options), method=method, variant="default", check=False, beta=0.0))
        for method in options.methods
    ]
    print("\n".join([head, "|---|---|---|---|---|", *rows]))


if __name__ == "__main__":
    main()
