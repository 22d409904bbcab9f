"""Pretrain, fine-tune and align a small language model, from nothing to a table, on a laptop's CPU.

Every stage is an ordinary `align` command on a shipped configuration; the commands are printed as they run, and each
can be repeated alone. `benchmarks/accuracy.py` runs the same chain over several seeds.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CONFIGS = Path("configs/quickstart")
ROOT = Path("runs/quickstart")
STAGES = ("pretrain", "sft", "dpo", "grpo")
SAMPLES = 8
# Which source of a configuration draws new problems, and its seed there.
SOURCES = {"pretrain": ("train", 0), "sft": ("train", 1), "sample_pairs": ("predict", 2), "grpo": ("train", 3)}


@dataclass(frozen=True)
class Measured:
    """What a stage reached on held-out problems, and how long it took.

    Attributes:
        stage: Name of the stage.
        exact_match: Share of the problems whose likeliest answer is right.
        pass_at_k: Share of the problems with a right answer among `SAMPLES` samples.
        seconds: Wall time of the stage, sampling of pairs included, evaluation not.
    """

    stage: str
    exact_match: float
    pass_at_k: float
    seconds: float


class Chain:
    """The quickstart's stages, each in a folder of its own.

    Args:
        root: Where the stages write: `<root>/<stage>/`.
        seed: Seed of weights, samples, order and training problems; None: as the configurations say.
        overrides: More arguments for every command.

    Attributes:
        configs: Folder of the configurations.
    """

    configs = CONFIGS

    def __init__(self, root: Path = ROOT, seed: int | None = None, overrides: Sequence[str] = ()) -> None:
        self.root, self.seed, self.overrides = root, seed, tuple(overrides)

    def fit(self, stage: str, *options: str, name: str | None = None) -> float:
        """Trains a stage, DPO after sampling its pairs; returns the seconds it took.

        Args:
            stage: Which configuration.
            *options: More arguments for `align fit`.
            name: Folder of the stage where it is not called as its configuration.
        """
        started = monotonic()
        if stage == "dpo":
            self.align("predict", "sample_pairs", *self._differences("sample_pairs", "sample_pairs"))
        self.align("fit", stage, *self._differences(stage, name or stage), *options)
        return monotonic() - started

    def test(self, stage: str, *, name: str | None = None, trained: bool = True, seconds: float = 0.0) -> Measured:
        """Measures a stage's policy, or the one it starts from, on held-out problems."""
        folder = self.root / (name or stage)
        options = ["--trainer.default_root_dir", str(folder / "test")]
        options += ["--model.policy", str(folder / "export")] if trained else []
        options += [] if self.seed is None else ["--seed_everything", str(self.seed)]
        metrics = self.align("test", stage, *options)
        return Measured(name or stage, metrics["test/exact_match"], metrics[f"test/pass@{SAMPLES}"], seconds)

    def align(self, command: str, config: str, *options: str) -> dict[str, float]:
        """Prints an `align` command, runs it in this process, and returns the metrics that it logged."""
        from alignment_modules.cli import run_cli

        arguments = [command, "--config", str(self.configs / f"{config}.yaml"), *options, *self.overrides]
        print(f"\n$ align {' '.join(arguments)}", flush=True)
        metrics = run_cli(arguments).trainer.callback_metrics
        return {key: float(value) for key, value in metrics.items()}

    def _differences(self, config: str, name: str) -> list[str]:
        """Arguments for what is not as the configuration says: folders and seeds."""
        options = []
        if self.root != ROOT or name != config:
            options += ["--trainer.default_root_dir", str(self.root / name)]
        if self.root != ROOT and config != "pretrain":
            options += ["--model.policy", str(self.root / ("pretrain" if config == "sft" else "sft") / "export")]
        if self.root != ROOT and config == "dpo":
            options += ["--data.train", str(self.root / "sample_pairs" / "predictions.jsonl")]
        if self.seed is not None:
            options += ["--seed_everything", str(self.seed), "--data.seed", str(self.seed)]
        if self.seed is not None and config in SOURCES:
            split, first = SOURCES[config]
            options += [f"--data.{split}.init_args.seed", str(first + len(SOURCES) * self.seed)]
        return options


def table(rows: Sequence[Measured]) -> str:
    """The results as a table in Markdown."""
    lines = [f"| stage | exact match | pass@{SAMPLES} | seconds |", "|---|---|---|---|"]
    lines += [f"| {row.stage} | {row.exact_match:.1%} | {row.pass_at_k:.1%} | {row.seconds:.0f} |" for row in rows]
    return "\n".join(lines)


def program(name: str) -> str:
    """How to call a program of this environment, which need not be active."""
    beside = Path(sys.executable).with_name(name)
    return os.path.relpath(beside) if beside.exists() else name


def main() -> None:
    """Runs all stages and prints what each reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="where the stages write (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of everything (default: as the configurations say)")
    parser.add_argument("overrides", nargs="*", help="more arguments for every align command, after --")
    arguments = parser.parse_args()
    sys.argv[1:] = []  # Lightning would take them for the arguments of its own commands

    started = monotonic()
    chain = Chain(arguments.root, arguments.seed, arguments.overrides)
    rows = [chain.test("pretrain", name="untrained", trained=False)]
    for stage in STAGES:
        rows.append(chain.test(stage, seconds=chain.fit(stage)))
    print(f"\nHeld-out additions, after {monotonic() - started:.0f} seconds in all:\n\n{table(rows)}")
    print(f"\nWatch the curves with\n\n    {program('tensorboard')} --logdir {chain.root}\n")


if __name__ == "__main__":
    main()
