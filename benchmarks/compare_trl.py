"""This library against TRL: same model, data, order, seeds and hyperparameters, in turn, in one call.

    python -m venv .venv-trl && .venv-trl/bin/pip install -e .[trl]
    python benchmarks/compare_trl.py --trl-python .venv-trl/bin/python

Every measurement is a process of its own (`run_trl.py`, `run_ours.py`). In each round every variant runs once, TRL's
and ours in turn; printed are medians over the rounds with their ranges, ratios within each round, and losses side by
side. GRPO, RLOO and online DPO sample, and samples differ between libraries, so their numbers are compared on given
completions.

Where definitions differ: TRL's RLOO has one ratio for a completion, the product of its tokens', so its loss is minus
the mean advantage; ours sums over tokens (`reduction="sequence_mean_token_sum"`). In the one update of a rollout both
have REINFORCE's gradient, so gradient norms alone are compared. TRL's ORPO has a likelihood over the tokens of prompt
and chosen completion, so ours is given `nll_on_prompt=True, nll_unit="tokens"`. KTO's mismatched pairs are the same
in both, since every prompt of the workload occurs once and a step is one batch; where prompts repeat, TRL pairs some
with a completion of their own, and under accumulation it estimates the divergence for each micro-batch. What both
libraries would draw for themselves, a reward model's head and LoRA's first factors, is drawn for both in the same
way.

Memory is compared at the same checkpointing setting: our default, which does not checkpoint, with TRL's
`no_checkpointing`, and our `checkpointing` with TRL's default, which does. Our default beside TRL's default is shown,
too: both as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import floor
import measure
import workload

TOLERANCE = 1e-4  # absolute; of what is above 1 relative
COMPARED = {"loss": "losses", "gradient norm": "grad_norms"}
HERE = Path(__file__).parent
OF_BETAS = ("grpo", "rloo")  # measured with each of `--betas`


@dataclass(frozen=True)
class Entry:
    """One thing to measure."""

    library: str  # "trl", "ours" or "bare"
    method: str
    variant: str = "default"
    beta: float = 0.0

    @property
    def case(self) -> str:
        """The method, with its KL coefficient where there are several."""
        return f"{self.method} beta={self.beta:g}" if self.method in OF_BETAS else self.method

    def command(self, options: argparse.Namespace, *extra: str) -> list[str]:
        """The command line of a measured process."""
        python = options.trl_python if self.library == "trl" else sys.executable
        script = HERE / ("run_trl.py" if self.library == "trl" else "run_ours.py")
        words = [python, script, self.method, "--variant", self.variant, "--beta", self.beta]
        words += ["--folder", options.folder, "--threads", options.threads, "--clock", options.clock]
        words += ["--size", options.size] + (["--lora"] if options.lora else [])
        words += ["--bare"] if self.library == "bare" else []
        return [*map(str, words), *extra]


def plan(options: argparse.Namespace) -> list[Entry]:
    """What one round measures, TRL's variants and ours in turn."""
    entries = []
    for method in options.methods:
        for beta in options.betas if method in OF_BETAS else [0.0]:
            theirs = [Entry("trl", method, name, beta) for name in measure.variants("trl", method)]
            own = [Entry("ours", method, name, beta) for name in measure.variants("ours", method)]
            own += [Entry("bare", method, "default", beta)] if options.bare else []
            for i in range(max(len(theirs), len(own))):
                entries += theirs[i : i + 1] + own[i : i + 1]
    return entries


def execute(command: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run a measured process; returns what it printed.

    Raises:
        SystemExit: it failed; the end of its output is in the message.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith(measure.MARK):
            return json.loads(line.removeprefix(measure.MARK))
    raise SystemExit(
        f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    )


def timed(entry: Entry, options: argparse.Namespace) -> dict[str, Any]:
    """One timed process; repeated while other processes kept the machine busy, and the quietest is returned."""
    steps = ["--steps", str(options.steps), "--warmup", str(options.warmup)]
    results = []
    for _ in range(1 + options.retries):
        results.append(execute(entry.command(options, *steps), options))
        if options.clock == "cpu" or results[-1]["other_processes"] <= options.quiet:
            break
    return min(results, key=lambda result: result["other_processes"])


def save(results: dict[Entry, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Writes what was measured so far, so that a call that is cut short leaves it."""
    if options.json:
        rows = [run for runs in results.values() for run in runs]
        Path(options.json).write_text(json.dumps({"folder": options.folder, "results": rows}, indent=1))


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Median and range."""
    values = sorted(values)
    return f"{statistics.median(values):.{digits}f} [{values[0]:.{digits}f}, {values[-1]:.{digits}f}]"


def speed_table(results: dict[Entry, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """Seconds, tokens per second and memory of every entry, with its share of the arithmetic floor's speed."""
    rates = [run["matrix_speed"] / 1e9 for runs in results.values() for run in runs]
    lines = [
        f"float32 matrix products: {spread(rates, 0)} GFLOP/s on {options.threads} threads",
        "| case | library | variant | s/step | tokens/s | peak MB | % of floor speed | others' CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry, runs in results.items():
        share = "" if entry.variant == "packing" else spread((100 * x for x in floor_shares(entry, runs, options)), 0)
        columns = [
            entry.case,
            entry.library,
            entry.variant,
            spread(run["seconds_per_step"] for run in runs),
            spread((run["tokens_per_second"] for run in runs), 0),
            spread((run["peak_mb"] for run in runs), 0),
            share,
            f"{max(run['other_processes'] for run in runs):.0%}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def floor_shares(entry: Entry, runs: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[float]:
    """Of each run, the time that the floor would take over the time that it took, with matrices as fast as in it."""
    batch = workload.SIZES[options.size].batch[entry.method]
    rows = workload.load_rows(measure.rows_folder(options), entry.method, options.warmup + options.steps)
    shares = []
    for run in runs:
        samples = batch * workload.GROUPS.get(entry.method, 1)
        lengths = [count / samples for count in run["completion_tokens"][options.warmup :]]
        operations = floor.step_operations(
            entry.method,
            rows[options.warmup * batch :],
            options.size,
            lora=options.lora,
            beta=workload.BETA if entry.method == "online_dpo" else entry.beta,
            cached=entry.variant in ("cached", "precomputed"),
            sampled=statistics.mean(lengths) if lengths else 0.0,
        )
        shares.append(operations / run["matrix_speed"] / run["seconds_per_step"])
    return shares


def ratio_table(results: dict[Entry, list[dict[str, Any]]]) -> str:
    """Ours over TRL: tokens per second and peak memory, within each round."""
    lines = ["| case | ours | TRL | tokens/s, ours / TRL | peak memory, ours / TRL |", "|---|---|---|---|---|"]
    for own, own_runs in results.items():
        for other, other_runs in results.items():
            if own.library == "trl" or other.library != "trl" or own.case != other.case:
                continue
            if not comparable(own.variant, other.variant):
                continue
            pairs = list(zip(own_runs, other_runs, strict=True))
            name = own.variant if own.library == "ours" else "default, without the Trainer"
            speed = spread(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
            memory = spread(a["peak_mb"] / b["peak_mb"] for a, b in pairs)
            lines.append(f"| {own.case} | {name} | {other.variant} | {speed} | {memory} |")
    return "\n".join(lines)


def comparable(own: str, other: str) -> bool:
    """Whether a variant of ours is set beside one of TRL's: like with like, and our default with all that TRL has."""
    like = {"cached": "precomputed", "checkpointing": "default"}
    return like[own] == other if own in like else other != "precomputed"


def compare_numbers(title: str, theirs: dict[str, Any], own: dict[str, Any], names: Sequence[str]) -> bool:
    """Print losses and gradient norms side by side, where both have them; whether those named agree."""
    good = True
    for name, key in COMPARED.items():
        left, right = theirs[key], own[key]
        if not left or len(left) != len(right):
            continue
        difference = max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(left, right, strict=True))
        held = difference <= TOLERANCE
        if name in names:
            good &= held
            verdict = "agree" if held else "DIFFER"
            print(f"\n{title}: largest difference of the {name} {difference:.1e}, allowed {TOLERANCE:.0e}: {verdict}")
        print(f"  {name:<13} TRL  {' '.join(f'{value:10.6f}' for value in left)}")
        print(f"  {'':<13} ours {' '.join(f'{value:10.6f}' for value in right)}")
    return good


def check(options: argparse.Namespace) -> bool:
    """Losses and gradient norms of both libraries on the same batches and, where they sample, the same completions."""
    good = True
    steps = ["--check", "--warmup", "0", "--steps", str(options.check_steps)]
    for method in options.methods:
        for beta in options.betas if method in OF_BETAS else [0.0]:
            theirs, own = (
                execute(entry.command(options, *steps), options)
                for entry in (Entry("trl", method, "no_checkpointing", beta), Entry("ours", method, "default", beta))
            )
            names = ["gradient norm"] if method in workload.GROUPS else []
            names += ["loss"] if method != "rloo" else []
            good &= compare_numbers(f"check {Entry('ours', method, beta=beta).case}", theirs, own, names)
    return good


def print_profiles(options: argparse.Namespace) -> None:
    """The costliest operators of ours and of TRL's default, for each case."""
    steps = ["--steps", str(options.steps), "--warmup", str(options.warmup), "--profile", str(options.profile)]
    for entry in plan(options):
        if entry.variant != "default" or entry.library == "bare":
            continue
        result = execute(entry.command(options, *steps), options)
        print(f"\nprofile {entry.case}, {entry.library}, {options.steps} steps")
        for row in result["profile"]:
            print(f"  {row['share']:6.1%} {row['seconds']:8.3f} s {row['calls']:7d} x {row['operator']}")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=workload.METHODS, default=list(workload.METHODS))
    measure.add_workload(parser)
    parser.add_argument("--lora", action="store_true", help=measure.LORA_HELP)
    parser.add_argument("--betas", nargs="+", type=float, default=[0.0, 0.04], help="KL coefficients of GRPO and RLOO")
    parser.add_argument("--rounds", type=int, default=3, help="0: only compare numbers")
    parser.add_argument("--steps", type=int, default=6, help="measured optimizer steps of each process")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--check-steps", type=int, default=8, help="steps whose losses are compared; 0: none")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=measure.CLOCKS, default="wall", help="cpu with --threads 1: a busy machine")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of the environment with TRL")
    parser.add_argument("--bare", action="store_true", help="also measure ours without the Trainer")
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS", help="also profile; print ROWS operators")
    parser.add_argument("--quiet", type=float, default=0.05, help="largest share of the CPU others may take in a run")
    parser.add_argument("--retries", type=int, default=2, help="repetitions of a run that was not quiet")
    parser.add_argument("--json", help="write all results to this file, after each process")
    return parser.parse_args()


def main() -> None:
    """Check, measure in turn, print."""
    options = parse()
    measure.rows_folder(options)
    good = check(options) if options.check_steps else True
    entries = plan(options)
    results: dict[Entry, list[dict[str, Any]]] = {entry: [] for entry in entries} if options.rounds else {}
    for number in range(options.rounds):
        for entry in entries:
            result = timed(entry, options)
            results[entry].append(result)
            save(results, options)
            print(
                f"round {number + 1}: {entry.case}, {entry.library} {entry.variant}: "
                f"{result['seconds_per_step']:.2f} s/step, {result['tokens_per_second']:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    for entry, runs in results.items():
        if entry.library == "ours" and entry.variant == "default" and entry.method not in workload.GROUPS:
            for other in [e for e in results if e.library == "trl" and e.case == entry.case and e.variant != "packing"]:
                title = f"timed {entry.case}, TRL {other.variant}"
                good &= compare_numbers(title, results[other][0], runs[0], ["loss"])
    if results:
        title = f"{options.size}, {'LoRA' if options.lora else 'all weights'}, {options.rounds} rounds"
        print(f"\n{title} of {options.steps} steps after {options.warmup}: median [smallest, largest]\n")
        print(speed_table(results, options), ratio_table(results), sep="\n\n")
    if options.profile:
        print_profiles(options)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
