"""The quickstart's chain over several seeds, with two controls, against the bars it has to clear.

    python benchmarks/accuracy.py --seeds 0 1 2

A seed that has finished below the same root is read from its `results.json`, not run again. Prints a table in Markdown
and what holds; exits with 1 where a bar is missed.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from quickstart import STAGES, Chain, Measured

PROBLEMS = 1000  # of the test set in configs/quickstart
TRIALS = {"frozen": "GRPO with learning rate 0", "shuffled": "GRPO with shuffled rewards"}
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
Results = Mapping[str, Measured]


def run_seed(root: Path, seed: int) -> dict[str, Measured]:
    """Runs the chain and both controls for one seed, or reads what an earlier run of it found."""
    finished = root / f"seed{seed}" / "results.json"
    if finished.exists():
        return {name: Measured(**values) for name, values in json.loads(finished.read_text()).items()}
    chain = Chain(root / f"seed{seed}", seed)
    results = {"untrained": chain.test("pretrain", name="untrained", trained=False)}
    for stage in STAGES:
        results[stage] = chain.test(stage, seconds=chain.fit(stage))
    controls = {
        "frozen": ["--model.optimizer.init_args.lr", "0.0", "--trainer.max_steps", "10"],
        "shuffled": ["--model.rewards", "shuffled_reward.shuffled_exact_match"],
    }
    for name, options in controls.items():
        seconds = chain.fit("grpo", *options, name=name)
        results[name] = chain.test("grpo", name=name, seconds=seconds)
    finished.write_text(json.dumps({name: asdict(measured) for name, measured in results.items()}, indent=2))
    return results


def same_weights(first: Path, second: Path) -> bool:
    """Whether two exported policies hold the same numbers, bit for bit."""
    from safetensors.torch import load_file

    left, right = (load_file(folder / "model.safetensors") for folder in (first, second))
    return left.keys() == right.keys() and all(bool((left[name] == right[name]).all()) for name in left)


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent trials (Wilson, 1927)."""
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def check(results: Results, root: Path) -> dict[str, bool]:
    """Which bars one seed clears."""
    exact = {name: row.exact_match for name, row in results.items()}
    return {
        "untrained at most 1 %": exact["untrained"] <= 0.01,
        "SFT between 25 % and 75 %": 0.25 <= exact["sft"] <= 0.75,
        "GRPO at least 90 %": exact["grpo"] >= 0.90,
        "GRPO at least 15 points over SFT": exact["grpo"] - exact["sft"] >= 0.15,
        "DPO at least 10 points over SFT": exact["dpo"] - exact["sft"] >= 0.10,
        "learning rate 0 changes no weight": same_weights(root / "sft" / "export", root / "frozen" / "export"),
        "shuffled rewards not above SFT's 95 % interval": exact["shuffled"] <= wilson(exact["sft"], PROBLEMS)[1],
    }


def spread(values: list[float]) -> str:
    """Mean and half-width of its 95 % interval over seeds, in per cent."""
    if len(values) < 2:
        return f"{values[0]:.1%}"
    quantile = STUDENT.get(len(values) - 1, 1.96)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):.1f} ± {100 * half:.1f} %"


def table(runs: Mapping[int, Results]) -> str:
    """All seeds as a table in Markdown."""
    seeds = list(runs)
    heads = ["stage", *(f"seed {seed}" for seed in seeds), "exact match", "pass@8", "seconds"]
    lines = [" | ".join(heads), "|".join(["---"] * len(heads))]
    for name in runs[seeds[0]]:
        rows = [runs[seed][name] for seed in seeds]
        cells = [TRIALS.get(name, name), *(f"{row.exact_match:.1%}" for row in rows)]
        cells += [spread([row.exact_match for row in rows]), spread([row.pass_at_k for row in rows])]
        lines.append(" | ".join([*cells, f"{statistics.mean(row.seconds for row in rows):.0f}"]))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def main() -> None:
    """Runs all seeds, prints the table and the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--root", type=Path, default=Path("runs/accuracy"), help="default: %(default)s")
    arguments = parser.parse_args()
    sys.argv[1:] = []  # Lightning would take them for the arguments of its own commands

    runs = {seed: run_seed(arguments.root, seed) for seed in arguments.seeds}
    checks = [check(results, arguments.root / f"seed{seed}") for seed, results in runs.items()]
    print(f"\nExact match on {PROBLEMS} held-out problems; mean and 95 % interval over seeds\n\n{table(runs)}\n")
    for bar in checks[0]:
        held = [checked[bar] for checked in checks]
        print(f"{'held' if all(held) else 'MISSED'}: {bar} ({sum(held)} of {len(held)} seeds)")
    sys.exit(not all(all(checked.values()) for checked in checks))


if __name__ == "__main__":
    main()
