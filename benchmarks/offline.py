"""What each offline paradigm makes of the quickstart's fine-tuned policy and its pairs, over several seeds.

    python benchmarks/offline.py --seeds 0 1 2

Pretrains, fine-tunes, samples pairs and trains the GRPO policy that is to be the teacher, all as the quickstart does,
or takes what lies below the root (`benchmarks/accuracy.py` leaves it there with the same `--root`). Each paradigm then
sees the same pairs once, from the same policy; the control is fine-tuning on the chosen completions for twice as long,
which is about as many tokens. Also trains a reward model, on pairs of more problems, and picks the best of eight
samples by it. Prints two tables in Markdown; exits with 1 where a bar is missed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from accuracy import spread, table
from methods import Methods, report
from quickstart import SAMPLES, Measured

GAIN = 0.08  # exact match over the fine-tuned policy's
PAIR_ACCURACY = 0.95
HELD_OUT = 1000  # problems whose samples the reward model is to judge
FREE = ("--model", "CPOModule", "--model.beta")
UNPAIRED = ("--data", "UnpairedDataModule", "--data.batch_size", "64", "--trainer.gradient_clip_val", "null")
# Options for `align fit --config configs/quickstart/dpo.yaml`; learning rates were chosen on seed 0's validation split.
METHODS: dict[str, tuple[str, ...]] = {
    "DPO": (),
    "DPO + RPO's NLL": ("--model.nll_coef", "0.2"),
    "IPO": ("--model.loss", "ipo", "--model.beta", "0.5", "--model.optimizer.init_args.lr", "3e-4"),
    "SimPO": (*FREE, "2.0", "--model.loss", "simpo", "--model.optimizer.init_args.lr", "1e-5"),
    "CPO": (*FREE, "0.1", "--model.optimizer.init_args.lr", "3e-4"),
    "ORPO": ("--model", "ORPOModule", "--model.beta", "1.0", "--model.optimizer.init_args.lr", "5e-4"),
    "KTO": ("--model", "KTOModule", "--model.beta", "1.0", "--model.optimizer.init_args.lr", "3e-4", *UNPAIRED),
}
# Of the chosen completions alone, by `align fit --config configs/quickstart/sft.yaml`.
OF_CHOSEN: dict[str, tuple[str, ...]] = {
    "distillation from GRPO": ("--model", "DistillationModule", "--model.teacher", "{teacher}"),
    "control: SFT on the chosen side": (),
}
REWARD_MODEL = "reward model"
# Pairs of few problems are learnt by heart before the model can judge a sum, and so they are with a short warm-up.
REWARD_PROBLEMS = 20_000
REWARD = (
    *("--model.evaluation", "null", "--model.optimizer.init_args.lr", "1e-3"),
    *("--model.lr_scheduler", "WarmupStableDecaySchedule", "--model.lr_scheduler.init_args.warmup_steps", "100"),
    *("--model.lr_scheduler.init_args.decay_share", "0.3"),
    *("--data.batch_size", "64", "--trainer.max_epochs", "10"),
)
HELD = {**METHODS, "distillation from GRPO": ()}


class Offline(Methods):
    """All paradigms of one seed; a folder for each."""

    def prepare(self) -> None:
        """Runs the stages of the chain that have not run, and writes the chosen side of the pairs."""
        super().prepare()
        with self.pairs.open() as lines:
            rows = [json.loads(line) for line in lines]
        chosen = [row | {"completion": _best(row)} for row in rows if len(set(row["rewards"])) > 1]
        kept = ("prompt", "completion")
        self.chosen.write_text("".join(json.dumps({key: row[key] for key in kept}) + "\n" for row in chosen))

    @property
    def pairs(self) -> Path:
        """Samples of the fine-tuned policy with their rewards, of which the data modules make pairs."""
        return self.root / "sample_pairs" / "predictions.jsonl"

    @property
    def chosen(self) -> Path:
        """The chosen completions alone."""
        return self.root / "sample_pairs" / "chosen.jsonl"

    def measure(self, name: str, split: str = "test", options: Sequence[str] | None = None) -> Measured:
        """Trains by one method and tests on a split's held-out problems."""
        given = METHODS.get(name) or OF_CHOSEN.get(name, ()) if options is None else options
        config, rows = ("dpo", self.pairs) if name in METHODS else ("sft", self.chosen)
        return self.train(name, config, [*given, "--data.train", str(rows)], split)

    def samples(self, split: str, size: int) -> Path:
        """Samples of the fine-tuned policy with their rewards, for problems of a split."""
        folder = self.root / f"samples_{split}"
        more = ["--data.predict.init_args.split", split, "--data.predict.init_args.size", str(size)]
        more += ["--trainer.default_root_dir", str(folder), "--model.policy", str(self.root / "sft" / "export")]
        self.chain.align("predict", "sample_pairs", *more, "--seed_everything", str(self.seed))
        return folder / "predictions.jsonl"

    def reward_model(
        self, split: str = "test", options: Sequence[str] = REWARD, problems: int = REWARD_PROBLEMS
    ) -> dict[str, float]:
        """Trains a reward model on pairs of training problems; on samples of a split's problems, what it is worth.

        The pairs are all of a right and a wrong completion; of each held-out problem one is judged.
        """
        samples, held_out, folder = self.samples("train", problems), self.samples(split, HELD_OUT), self.root / "reward"
        pairs = samples.with_name("pairs.jsonl")
        with samples.open() as lines:
            pairs.write_text("".join(json.dumps(pair) + "\n" for line in lines for pair in _pairs(json.loads(line))))
        policy = str(self.root / "sft" / "export")
        model = ["--model", "RewardModule", "--model.policy.path", policy, "--model.policy.head", "scalar"]
        rows = ["--trainer.default_root_dir", str(folder), "--data.seed", str(self.seed)]
        rows += ["--data.train", str(pairs), "--data.validation", str(held_out), "--data.test", "null"]
        started = monotonic()
        metrics = self.chain.align("fit", "dpo", *model, *rows, "--seed_everything", str(self.seed), *options)
        found = {"held-out pair accuracy": metrics["val/rewards/accuracies"], "seconds": monotonic() - started}
        return found | best_of(folder / "export", held_out)


def best_of(reward: Path, samples: Path) -> dict[str, float]:
    """Share of problems whose best of the samples is right: by a reward model, by the verifier, and of any sample."""
    from alignment_modules.rewards.model import SequenceClassifier

    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    prompts = [row["prompt"] for row in rows for _ in row["completions"]]
    scores = SequenceClassifier(str(reward), batch_size=500)(
        completions=[text for row in rows for text in row["completions"]], prompts=prompts
    )
    each = iter(scores)
    picked = [max(row["rewards"], key=lambda _: next(each)) for row in rows]
    return {
        f"best of {SAMPLES} by the reward model": sum(picked) / len(rows),
        f"best of {SAMPLES} by the verifier": sum(max(row["rewards"]) for row in rows) / len(rows),
        "one sample": sum(sum(row["rewards"]) / len(row["rewards"]) for row in rows) / len(rows),
    }


def run_seed(root: Path, seed: int) -> tuple[dict[str, Measured], dict[str, float]]:
    """Everything of one seed but what an earlier run of it found."""
    offline, file = Offline(root / f"seed{seed}", seed), root / f"seed{seed}" / "offline.json"
    offline.prepare()
    found: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {}
    for name in ("SFT", *METHODS, *OF_CHOSEN, REWARD_MODEL):
        if name not in found:
            if name == REWARD_MODEL:
                found[name] = offline.reward_model()
            else:
                found[name] = asdict(
                    offline.test(name, offline.root / "sft") if name == "SFT" else offline.measure(name)
                )
            file.write_text(json.dumps(found, indent=2))
    reward = found.pop(REWARD_MODEL)
    return {name: Measured(**values) for name, values in found.items()}, reward


def rewards_table(found: Sequence[dict[str, float]]) -> str:
    """What the reward models are worth, as a table in Markdown."""
    rows = [f"| {name} | {spread([seed[name] for seed in found])} |" for name in found[0] if name != "seconds"]
    rows.append(f"| seconds | {statistics.mean(seed['seconds'] for seed in found):.0f} |")
    return "\n".join(["| reward model | mean and 95 % interval |", "|---|---|", *rows])


def main() -> None:
    """Runs all seeds, prints the tables and the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--root", type=Path, default=Path("runs/accuracy"), help="default: %(default)s")
    arguments = parser.parse_args()
    sys.argv[1:] = []  # Lightning would take them for the arguments of its own commands

    found = {seed: run_seed(arguments.root, seed) for seed in arguments.seeds}
    methods = {seed: rows for seed, (rows, _) in found.items()}
    rewards = [reward for _, reward in found.values()]
    print(f"\nExact match on held-out problems; mean and 95 % interval over seeds\n\n{table(methods)}\n")
    print(f"{rewards_table(rewards)}\n")
    bars = {
        f"{name} at least {GAIN:.0%} over SFT": [_gain(rows, name) >= GAIN for rows in methods.values()]
        for name in HELD
    }
    bars["pair accuracy of the reward model"] = [row["held-out pair accuracy"] >= PAIR_ACCURACY for row in rewards]
    sys.exit(not report(bars))


def _pairs(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Every completion that is right, each once, against every other that is wrong."""
    best, judged = max(row["rewards"]), dict(zip(row["completions"], row["rewards"], strict=True))
    right, wrong = ([text for text, reward in judged.items() if (reward == best) == good] for good in (True, False))
    return [{"prompt": row["prompt"], "chosen": one, "rejected": other} for one in right for other in wrong]


def _best(row: dict[str, list[float]]) -> object:
    return row["completions"][row["rewards"].index(max(row["rewards"]))]


def _gain(rows: dict[str, Measured], name: str) -> float:
    return rows[name].exact_match - rows["SFT"].exact_match


if __name__ == "__main__":
    main()
