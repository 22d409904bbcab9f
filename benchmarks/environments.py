"""What GRPO and PPO make of a policy that asks clumsily for a hidden number, over several seeds.

    python benchmarks/environments.py --seeds 0 1 2

One policy is pretrained on the notes of careless players and fine-tuned on their conversations; what is there below the
root is taken. From it start, with every seed, GRPO, PPO with advantages by turn, and two controls: GRPO with learning
rate 0, and GRPO on a tool that answers for another number than the one that is sought (`benchmarks/decoy.py`), so that
nothing can be known. That one is measured where it was trained. A run that has finished below the root is read from
`results.json`, not run again. Prints a table in Markdown of held-out episodes; exits with 1 where a bar is missed.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from time import process_time

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from accuracy import same_weights, wilson
from methods import report, slug
from quickstart import Chain

EPISODES = 200  # of the test set in configs/environments
SAMPLES = 4
GAIN = 0.30
DECOY = ("--model.environments", "decoy.DecoyNumber")
FROZEN, BLIND = "control: GRPO with learning rate 0", "control: GRPO, tool answers for another number"
# Configuration and options of `align fit`.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "GRPO": ("grpo", ()),
    "PPO, advantages by turn": ("ppo", ()),
    FROZEN: ("grpo", ("--model.optimizer.init_args.lr", "0.0", "--trainer.max_steps", "5")),
    BLIND: ("grpo", DECOY),
}
START, BLIND_START = "SFT", "SFT, tool answers for another number"
Found = dict[str, float | None]
SHOWN = {"solved": "sample_accuracy", "greedy": "exact_match", "calls": "tools/calls_solved"}


class Environments(Chain):
    """The chain in `configs/environments`, whose methods all start from one fine-tuned policy.

    Args:
        root: Where everything is written.
        overrides: More arguments for every command.
    """

    configs = Path("configs/environments")

    def __init__(self, root: Path, overrides: Sequence[str] = ()) -> None:
        super().__init__(root, overrides=overrides)

    def prepare(self) -> None:
        """Runs the stages before the methods that have not run."""
        for stage, before in (("pretrain", None), ("sft", "pretrain")):
            if not (self.root / stage / "export").exists():
                start = ["--model.policy", str(self.root / before / "export")] if before else []
                self.align("fit", stage, "--trainer.default_root_dir", str(self.root / stage), *start)

    def start(self) -> dict[str, Found]:
        """What their policy reaches, with the tool and with the decoy."""
        folder = self.root / "sft"
        return self.kept("sft", {START: partial(self.play, folder), BLIND_START: partial(self.play, folder, DECOY)})

    def run_seed(self, seed: int, names: Sequence[str]) -> dict[str, Found]:
        """What the methods reach with one seed."""
        return self.kept(f"seed{seed}", {name: partial(self.train, name, seed) for name in names})

    def train(self, name: str, seed: int) -> Found:
        """Trains by one method, and plays; the seconds are the processor's."""
        config, options = METHODS[name]
        folder = self.root / f"seed{seed}" / slug(name)
        where = ["--trainer.default_root_dir", str(folder), "--model.policy", str(self.root / "sft" / "export")]
        # New searches, of no other stage and no other seed.
        seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
        seeds += ["--data.train.init_args.seed", str(1000 + seed)]
        started = process_time()
        self.align("fit", config, *options, *where, *seeds)
        seconds = process_time() - started
        return self.play(folder, DECOY if name == BLIND else ()) | {"seconds": seconds}

    def play(self, folder: Path, options: Sequence[str] = ()) -> Found:
        """The held-out episodes, by the policy that a stage left in its folder; None where none is solved."""
        more = ["--model.policy", str(folder / "export"), "--trainer.default_root_dir", str(folder / "test")]
        metrics = self.align("test", "grpo", *more, *options)
        return {name: metrics.get(f"test/{metric}") for name, metric in SHOWN.items()}

    def kept(self, folder: str, make: Mapping[str, Callable[[], Found]]) -> dict[str, Found]:
        """What was found earlier in a folder, and what is made now because it was not."""
        file = self.root / folder / "results.json"
        found: dict[str, Found] = json.loads(file.read_text()) if file.exists() else {}
        for name, one in make.items():
            if name not in found:
                found[name] = one()
                file.write_text(json.dumps(found, indent=2))
        return {name: found[name] for name in make}


def bars(start: dict[str, Found], found: dict[int, dict[str, Found]], root: Path) -> dict[str, list[bool]]:
    """Which bars each seed clears."""
    held: dict[str, list[bool]] = {}
    names = next(iter(found.values())).keys()
    for name in [name for name in names if name not in (FROZEN, BLIND)]:
        runs = [run[name] for run in found.values()]
        held[f"{name} solves {GAIN:.0%} more than SFT"] = [
            run["solved"] - start[START]["solved"] >= GAIN for run in runs
        ]
        held[f"{name} needs fewer calls for it"] = [(run["calls"] or math.inf) < start[START]["calls"] for run in runs]
    if FROZEN in names:
        folders = [root / f"seed{seed}" / slug(FROZEN) for seed in found]
        held["learning rate 0 changes no weight"] = [
            same_weights(root / "sft" / "export", folder / "export") for folder in folders
        ]
    if BLIND in names:
        _, most = wilson(start[BLIND_START]["solved"], EPISODES * SAMPLES)
        held["not above the start's 95 % interval where the tool tells nothing"] = [
            run[BLIND]["solved"] <= most for run in found.values()
        ]
    return held


def table(start: dict[str, Found], found: dict[int, dict[str, Found]]) -> str:
    """The results as a table in Markdown."""
    heads = ["policy", *(f"seed {seed}" for seed in found), "solved", "greedy", "calls of a solved episode", "seconds"]
    lines = [" | ".join(heads), "|".join(["---"] * len(heads))]
    rows = {name: [one] for name, one in start.items()}
    rows |= {name: [run[name] for run in found.values()] for name in next(iter(found.values()))}
    for name, runs in rows.items():
        each = [f"{run['solved']:.1%}" for run in runs] if len(runs) == len(found) else [""] * len(found)
        values = [f"{mean(run[key] for run in runs):.1%}" for key in ("solved", "greedy")]
        seconds = [run["seconds"] for run in runs if "seconds" in run]
        calls = [run["calls"] for run in runs if run["calls"] is not None]
        cells = [name, *each, *values, f"{mean(calls):.2f}" if calls else ""]
        lines.append(" | ".join([*cells, f"{mean(seconds):.0f}" if seconds else ""]))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def main() -> None:
    """Runs all seeds, prints the table and the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--root", type=Path, default=Path("runs/environments"), help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="default: all")
    arguments = parser.parse_args()
    sys.argv[1:] = []  # Lightning would take them for the arguments of its own commands

    chain = Environments(arguments.root)
    chain.prepare()
    start = chain.start()
    found = {seed: chain.run_seed(seed, arguments.methods) for seed in arguments.seeds}
    print(f"\n{EPISODES} held-out searches, {SAMPLES} samples and a greedy one each\n\n{table(start, found)}\n")
    sys.exit(not report(bars(start, found, arguments.root)))


if __name__ == "__main__":
    main()
