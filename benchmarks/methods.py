"""What the benchmarks of several methods share: each is trained from a seed's fine-tuned policy, and tested alike."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import process_time

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from quickstart import SAMPLES, STAGES, Chain, Measured


class Methods:
    """The methods of one seed.

    Args:
        root: Where the seed's chain lies, and where a folder for each method goes.
        seed: Its seed.
        overrides: More arguments for every command.
    """

    def __init__(self, root: Path, seed: int, overrides: Sequence[str] = ()) -> None:
        self.chain, self.root, self.seed = Chain(root, seed, overrides), root, seed

    def prepare(self) -> None:
        """Runs the stages of the chain that have not run."""
        for stage in STAGES:
            if not (self.root / stage / "export").exists():
                self.chain.fit(stage)

    def train(self, name: str, config: str, options: Iterable[str], split: str = "test") -> Measured:
        """Trains from the fine-tuned policy and tests on a split's held-out problems; the seconds are the processor's.

        Args:
            name: Of the method.
            config: Whose configuration of the quickstart is taken.
            options: What is not as it says; `{teacher}` stands for the GRPO policy's folder.
            split: Of the problems.
        """
        folder = self.root / slug(name)
        more = ["--trainer.default_root_dir", str(folder), "--model.policy", str(self.root / "sft" / "export")]
        more += ["--seed_everything", str(self.seed), "--data.seed", str(self.seed)]
        given = [option.format(teacher=self.root / "grpo" / "export") for option in options]
        started = process_time()
        self.chain.align("fit", config, *given, *more)
        return self.test(name, folder, process_time() - started, split)

    def test(self, name: str, folder: Path, seconds: float = 0.0, split: str = "test") -> Measured:
        """Tests what a folder exports."""
        more = ["--trainer.default_root_dir", str(folder / "test"), "--model.policy", str(folder / "export")]
        more += ["--seed_everything", str(self.seed), "--data.test.init_args.split", split]
        metrics = self.chain.align("test", "sft", *more)
        return Measured(name, metrics["test/exact_match"], metrics[f"test/pass@{SAMPLES}"], seconds)


def report(bars: Mapping[str, Sequence[bool]]) -> bool:
    """Prints which bars were cleared by which seeds; gives whether all were by all."""
    for bar, held in bars.items():
        print(f"{'held' if all(held) else 'MISSED'}: {bar} ({sum(held)} of {len(held)} seeds)")
    return all(all(held) for held in bars.values())


def slug(name: str) -> str:
    """A method's name as that of a folder."""
    return "".join(character if character.isalnum() else "_" for character in name.lower())
