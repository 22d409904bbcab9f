"""What both measured processes share: options, the step clock, the profile, and the JSON they print."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import floor
import workload

VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {  # of each library and method, the default first
    "trl": {
        "sft": ("default", "no_checkpointing", "padding_free", "packing"),
        "dpo": ("default", "no_checkpointing", "precomputed"),
    },
    "ours": {"dpo": ("default", "checkpointing", "cached")},
}
PLAIN = {"trl": ("default", "no_checkpointing"), "ours": ("default", "checkpointing")}  # of the methods not named above
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LORA_HELP = "train adapters on all linear maps but the head; default: all weights"
MARK = "RESULT "  # begins the line of standard output that holds the result


def variants(library: str, method: str) -> tuple[str, ...]:
    """How a method is measured with a library, the default first."""
    return VARIANTS[library].get(method, PLAIN[library])


def check_variant(library: str, options: argparse.Namespace) -> None:
    """Ends the process where the method has no such variant."""
    known = variants(library, options.method)
    if options.variant not in known:
        raise SystemExit(f"--variant {options.variant}: {options.method} has {', '.join(known)}")


def add_workload(parser: argparse.ArgumentParser) -> None:
    """The options that say which workload."""
    parser.add_argument("--size", choices=workload.SIZES, default="7m", help="parameters of the model")
    parser.add_argument("--folder", default="runs/benchmark", help="where the workload is, or is written")


def arguments(description: str, library: str) -> argparse.ArgumentParser:
    """The options of a measured process."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=workload.METHODS)
    names = "; ".join(f"{method}: {', '.join(variants(library, method))}" for method in workload.METHODS)
    parser.add_argument("--variant", default="default", help=names)
    add_workload(parser)
    parser.add_argument("--lora", action="store_true", help=LORA_HELP)
    parser.add_argument("--steps", type=int, default=6, help="measured optimizer steps")
    parser.add_argument("--warmup", type=int, default=2, help="optimizer steps before the measured ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: this process's processor time; with --threads 1 it is nearly right on a busy machine too",
    )
    parser.add_argument("--beta", type=float, default=0.0, help="GRPO's KL coefficient")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare numbers, not speed: GRPO gets fixed completions; the gradient norm of every step is reported",
    )
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS", help="print the costliest ROWS operators")
    return parser


def peak_rss() -> float:
    """Largest resident memory of this process so far, MB (1e6 bytes)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started this process
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


class StepClock:
    """Time at the end of every optimizer step; a step's time runs from the end of the one before.

    Loading and moving the batch, logging and everything else that the trainer does between two steps is inside.
    """

    def __init__(self, warmup: int, timer: Callable[[], float] = time.perf_counter) -> None:
        self.times: list[float] = []
        self.timer = timer
        self.warmup = warmup
        self.neighbours = Neighbours()
        self.others = 0.0  # share of the machine that other processes took in the measured steps
        self.matrix_speeds: list[float] = []  # operations per second, before the first step and after the last

    def start(self) -> None:
        """The clock starts just before the first step."""
        self.matrix_speeds.append(floor.matrix_speed(self.timer))
        self.tick()

    def tick(self) -> None:
        """An optimizer step is over."""
        self.times.append(self.timer())
        if len(self.times) == self.warmup + 1:
            self.neighbours.start()
        elif len(self.times) > self.warmup:
            self.others = self.neighbours.share()

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step so far."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Neighbours:
    """How busy other processes kept the machine: their share of all cores' time between `start` and `share`.

    A neighbour slows a process with spinning OpenMP threads by far more than its own share of the cores, so a run with
    a busy neighbour says nothing. Linux only; elsewhere the share is 0.
    """

    def start(self) -> None:
        """Begin to watch."""
        self.before = self._read()

    def share(self) -> float:
        """Share of all cores' time that others used since `start`, 0 to 1."""
        wall, busy, own = (after - before for after, before in zip(self._read(), self.before, strict=True))
        return max(busy - own, 0.0) / (wall * (os.cpu_count() or 1)) if wall > 0 else 0.0

    def _read(self) -> tuple[float, float, float]:
        """Seconds: wall clock, busy time of all cores, processor time of this process."""
        own = os.times()
        busy = 0.0
        if Path("/proc/stat").exists():
            user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
            busy = (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")  # irq, softirq, steal
        return time.perf_counter(), busy, own.user + own.system


class Profile:
    """`torch.profiler` around the steps after the warm-up; does nothing when `rows` is 0."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.profiler: Any = None

    def start(self) -> None:
        """Begin to record."""
        if self.rows:
            from torch.profiler import ProfilerActivity, profile

            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.start()

    def stop(self) -> list[dict[str, Any]]:
        """The costliest operators by their own time: name, calls, seconds and share of all operators' time."""
        if self.profiler is None:
            return []
        self.profiler.stop()
        events = self.profiler.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        top = sorted(events, key=lambda event: -event.self_cpu_time_total)[: self.rows]
        return [
            {
                "operator": event.key,
                "calls": event.count,
                "seconds": round(event.self_cpu_time_total / 1e6, 4),
                "share": round(event.self_cpu_time_total / total, 4),
            }
            for event in top
        ]


def measured_apart(*options: str) -> dict[str, Any]:
    """Runs this script again with more options, in a process of its own; gives what it printed behind `MARK`."""
    command = [sys.executable, *sys.argv, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.split(MARK)[1])


def report(
    options: argparse.Namespace,
    *,
    library: str,
    clock: StepClock,
    tokens: Sequence[int],
    losses: Sequence[float],
    baseline_mb: float,
    profile: Sequence[dict[str, Any]] = (),
    **extra: Any,
) -> None:
    """Print one line of JSON: the result of this process.

    Args:
        options: the parsed options.
        library: "trl" or "ours".
        clock: has ticked once per optimizer step.
        tokens: real tokens of each optimizer step, warm-up included.
        losses: loss of each optimizer step, warm-up included.
        baseline_mb: peak memory after the imports, before anything was loaded, MB.
        profile: what `Profile.stop` gave.
        extra: anything else that the comparison should see.

    Raises:
        RuntimeError: the number of steps, token counts and losses differ.
    """
    seconds = clock.seconds
    if not len(seconds) == len(tokens) == len(losses) == options.warmup + options.steps:
        raise RuntimeError(f"{len(seconds)} steps timed, {len(tokens)} token counts, {len(losses)} losses")
    measured, peak = seconds[options.warmup :], peak_rss()
    speeds = [*clock.matrix_speeds, floor.matrix_speed(clock.timer)]
    result = {
        "library": library,
        "method": options.method,
        "variant": options.variant,
        "size": options.size,
        "lora": options.lora,
        "beta": options.beta,
        "seconds_per_step": sum(measured) / len(measured),
        "seconds_median": statistics.median(measured),
        "tokens_per_second": sum(tokens[options.warmup :]) / sum(measured),
        "peak_mb": peak,
        "baseline_mb": baseline_mb,
        "matrix_speed": statistics.geometric_mean(speeds),
        "other_processes": round(clock.others, 3),
        "seconds": [round(value, 4) for value in seconds],
        "tokens": list(tokens),
        "losses": list(losses),
        "profile": list(profile),
        **extra,
    }
    print(MARK + json.dumps(result), flush=True)


def rows_folder(options: argparse.Namespace) -> Path:
    """The workload's folder; written by another process if it is not there, so that this one's memory stays its own."""
    folder = Path(options.folder) / options.size
    if not workload.is_ready(folder):
        script = Path(__file__).with_name("workload.py")
        command = [sys.executable, script, options.folder, "--size", options.size]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder
