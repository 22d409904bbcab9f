"""What each online method makes of the quickstart's fine-tuned policy, over several seeds, by as many samples.

    python benchmarks/online.py --seeds 0 1 2

Runs the quickstart's chain with the controls of `benchmarks/accuracy.py` (GRPO with learning rate 0 and with shuffled
rewards), or takes what that left below the same root. Each method then starts from the chain's fine-tuned policy and
draws 25,600 samples; the third control is fine-tuning on as many new demonstrations. The chain's GRPO policy is the
teacher. A method that has finished below the root is read from `online.json`, not run again. Prints a table in
Markdown; exits with 1 where a bar is missed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from accuracy import TRIALS, same_weights, table, wilson
from accuracy import run_seed as run_chain
from methods import Methods, report
from quickstart import Measured

PROBLEMS = 1000  # of the test set in configs/quickstart
GAIN = 0.15  # exact match over the fine-tuned policy's
SEVERAL_STEPS = ("--model.minibatches", "2")  # so that the ratio is not 1 in the second
# Two samples a problem; as many in all.
PAIRS = ("--data.train.init_args.size", "12800", "--data.batch_size", "128", "--model.num_generations", "2")
# Options for `align fit --config configs/quickstart/grpo.yaml`, whose learning rate all take.
METHODS: dict[str, tuple[str, ...]] = {
    "GRPO": (),
    "Dr. GRPO": ("--model.loss", "dr_grpo", "--model.scale_rewards", "none"),
    "GSPO": (
        *("--model.loss", "grpo", "--model.importance_level", "sequence", *SEVERAL_STEPS),
        *("--model.epsilon", "3e-4", "--model.epsilon_high", "4e-4"),
    ),
    "CISPO": ("--model.loss", "cispo", "--model.epsilon", "null", *SEVERAL_STEPS),
    "RLOO": ("--model.scale_rewards", "leave_one_out"),
    "REINFORCE++": ("--model.preset", "reinforce_pp", "--model.beta", "0"),
    "ReMax": ("--model.preset", "remax"),
    "GRPO + teacher": ("--model.teacher", "{teacher}", "--model.teacher_coef", "0.1"),
    "online DPO": ("--model", "OnlineDPOModule", "--model.loss", "sigmoid", "--model.beta", "0.1", *PAIRS),
}
# The same, by `align fit --config configs/quickstart/sft.yaml`.
ROWS = ("--data.train.init_args.size", "25600", "--data.batch_size", "256", "--trainer.max_epochs", "1")
STUDENT = ("--model", "DistillationModule", "--model.teacher", "{teacher}")
WRITES = ("--model.on_policy_share", "1", "--model.max_completion_length", "6")
OF_ROWS: dict[str, tuple[str, ...]] = {
    "on-policy distillation from GRPO": (*STUDENT, *WRITES, *ROWS),
    "control: continued SFT": ROWS,
}
# With a configuration of their own.
CONFIGURED: dict[str, str] = {"PPO": "ppo"}
CONTROLS = {f"control: {words}": name for name, words in TRIALS.items()}  # of the chain
FROZEN, SHUFFLED = CONTROLS


class Online(Methods):
    """All methods of one seed."""

    def measure(self, name: str, split: str = "test", options: Sequence[str] | None = None) -> Measured:
        """Trains by one method and tests on a split's held-out problems.

        Args:
            name: Of `METHODS`, `CONFIGURED` or `OF_ROWS`.
            split: Of the problems.
            options: In place of the method's own.
        """
        given = (METHODS | OF_ROWS).get(name, ()) if options is None else options
        # New problems, of no other stage and no other seed.
        problems = ["--data.train.init_args.seed", str(1000 + self.seed)]
        config = CONFIGURED.get(name, "sft" if name in OF_ROWS else "grpo")
        return self.train(name, config, [*problems, *given], split)


def run_seed(root: Path, seed: int, names: Sequence[str]) -> dict[str, Measured]:
    """Everything of one seed but what an earlier run of it found."""
    chain = run_chain(root, seed)
    online, file = Online(root / f"seed{seed}", seed), root / f"seed{seed}" / "online.json"
    found: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        if name not in found:
            found[name] = asdict(online.measure(name))
            file.write_text(json.dumps(found, indent=2))
    measured = {name: Measured(**found[name]) for name in names}
    return {"SFT": chain["sft"]} | measured | {name: chain[trial] for name, trial in CONTROLS.items()}


def bars(found: dict[int, dict[str, Measured]], root: Path) -> dict[str, list[bool]]:
    """Which bars each seed clears."""
    exact = [{name: row.exact_match for name, row in rows.items()} for rows in found.values()]
    held = {
        f"{name} at least {GAIN:.0%} over SFT": [row[name] - row["SFT"] >= GAIN for row in exact]
        for name in found[next(iter(found))]
        if name != "SFT" and not name.startswith("control")
    }
    folders = [root / f"seed{seed}" for seed in found]
    held["learning rate 0 changes no weight"] = [
        same_weights(folder / "sft" / "export", folder / CONTROLS[FROZEN] / "export") for folder in folders
    ]
    held["shuffled rewards not above SFT's 95 % interval"] = [
        row[SHUFFLED] <= wilson(row["SFT"], PROBLEMS)[1] for row in exact
    ]
    return held


def main() -> None:
    """Runs all seeds, prints the table and the bars."""
    every = [*METHODS, *CONFIGURED, *OF_ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--root", type=Path, default=Path("runs/accuracy"), help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=every, default=every, help="default: all")
    arguments = parser.parse_args()
    sys.argv[1:] = []  # Lightning would take them for the arguments of its own commands

    found = {seed: run_seed(arguments.root, seed, arguments.methods) for seed in arguments.seeds}
    print(f"\nExact match on {PROBLEMS} held-out problems; mean and 95 % interval over seeds\n\n{table(found)}\n")
    sys.exit(not report(bars(found, arguments.root)))


if __name__ == "__main__":
    main()
