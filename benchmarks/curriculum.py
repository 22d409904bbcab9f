"""Whether a curriculum by success beats uniform sampling where most prompts are solved already.

    python benchmarks/curriculum.py --seeds 0 1 2

One policy is pretrained and fine-tuned as in the quickstart, on summands of four digits; what is there below the root
is taken. From it GRPO starts twice a seed, with as many steps and samples on the same problems, of which it solves
seven in eight from the start: drawn uniformly, and with those set aside that are solved always or never (`BySuccess`).
A seed draws its own problems and samples. Prints a table in Markdown of held-out problems of four digits; exits with 1
where the curriculum does not win with every seed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from methods import report
from quickstart import SAMPLES, Chain

from datamodules.tasks import AdditionPrompts
from datamodules.tasks.problems import units_first

DIGITS = 4
EASY, HARD = 448, 64
# 32 of the 512 problems are drawn for each of 80 steps
SCHEDULE = ("--trainer.max_epochs", "5", "--model.max_completion_length", "7", "--model.optimizer.lr", "3e-5")
DEMONSTRATIONS = ("--data.train.init_args.digits", str(DIGITS))
LONGER = ("--data.test.init_args.digits", str(DIGITS), "--model.evaluation.max_completion_length", "7")
ARMS: dict[str, tuple[str, ...]] = {"uniform": (), "by success": ("--data.curriculum", "BySuccess")}
SIGNAL = "train/groups_with_signal"


def prepare(chain: Chain) -> None:
    """Runs the stages before GRPO that have not run."""
    pretrain, sft = chain.root / "pretrain", chain.root / "sft"
    if not (pretrain / "export").exists():
        chain.align("fit", "pretrain", *DEMONSTRATIONS, "--trainer.default_root_dir", str(pretrain))
    if not (sft / "export").exists():
        more = ["--trainer.default_root_dir", str(sft), "--model.policy", str(pretrain / "export")]
        chain.align("fit", "sft", *DEMONSTRATIONS, *LONGER, *more)


def test(chain: Chain, folder: Path) -> dict[str, float]:
    """Exact match of a folder's policy and its share of problems that one of several samples solves."""
    more = ["--trainer.default_root_dir", str(folder / "test"), "--model.policy", str(folder / "export")]
    return chain.align("test", "sft", *LONGER, *more)


def problems(seed: int) -> list[dict[str, Any]]:
    """A seed's training problems: easy ones, numbers below 100 without a carry, and any of four digits."""
    small = AdditionPrompts(split="train", size=4 * EASY, seed=seed, digits=2)
    pairs = np.stack((small.first, small.second), axis=1)
    plain = ((pairs % 10).sum(axis=1) < 10) & ((pairs // 10).sum(axis=1) < 10)
    rows = [small.row(*written(first, second)) for first, second in pairs[plain][:EASY].tolist()]
    hard = AdditionPrompts(split="train", size=HARD, seed=seed, digits=DIGITS)
    return rows + [hard[index] for index in range(HARD)]


def written(first: int, second: int) -> tuple[str, str]:
    """A problem and its answer, filled with zeros as those of four digits are."""
    return f"{units_first(first, DIGITS)}+{units_first(second, DIGITS)}", units_first(first + second, DIGITS + 1)


def run(chain: Chain, seed: int, arm: str) -> dict[str, float]:
    """GRPO of one seed by one arm, and what it reached."""
    folder, source = chain.root / f"{arm.replace(' ', '_')}_{seed}", chain.root / f"problems_{seed}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in problems(100 + seed)), encoding="utf-8")
    where = ["--trainer.default_root_dir", str(folder), "--model.policy", str(chain.root / "sft" / "export")]
    seeds = ["--seed_everything", str(seed), "--data.seed", str(seed), "--data.train", str(source)]
    trained = chain.align("fit", "grpo", *LONGER, *SCHEDULE, *ARMS[arm], *where, *seeds)
    return test(chain, folder) | {SIGNAL: trained[SIGNAL]}


def table(start: dict[str, float], found: dict[str, list[dict[str, float]]], seeds: Sequence[int]) -> str:
    """The results as a table in Markdown."""
    names = ("test/exact_match", f"test/pass@{SAMPLES}", SIGNAL)
    lines = [f"| problems | seed | exact match | pass@{SAMPLES} | groups with signal |", "|---|---|---|---|---|"]
    lines.append(f"| (before GRPO) | | {start[names[0]]:.1%} | {start[names[1]]:.1%} | |")
    for arm, runs in found.items():
        for seed, metrics in zip(seeds, runs, strict=True):
            lines.append(f"| {arm} | {seed} | " + " | ".join(f"{metrics[name]:.1%}" for name in names) + " |")
        lines.append(f"| {arm} | mean | " + " | ".join(f"{mean(m[name] for m in runs):.1%}" for name in names) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs both arms with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/curriculum"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", help="more arguments for every align command, after --")
    arguments = parser.parse_args()
    sys.argv[1:] = []  # Lightning would take them for the arguments of its own commands
    chain = Chain(arguments.root, overrides=arguments.overrides)
    prepare(chain)
    start = test(chain, chain.root / "sft")
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in arguments.seeds:
        for arm in ARMS:
            found[arm].append(run(chain, seed, arm))
    print(f"\n{table(start, found, arguments.seeds)}\n")
    pairs = zip(found["uniform"], found["by success"], strict=True)
    wins = [one["test/exact_match"] < other["test/exact_match"] for one, other in pairs]
    sys.exit(0 if report({"exact match by success above uniform": wins}) else 1)


if __name__ == "__main__":
    main()
