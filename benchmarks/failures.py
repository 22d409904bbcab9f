"""What failures look like: runs of the quickstart's task that go wrong beside some that go well, drawn for the docs.

    python benchmarks/failures.py

Takes the quickstart's chain of seed 0, or what `benchmarks/accuracy.py` left of it below the same root. Each run starts
from one of its policies and is validated on 500 held-out problems as it goes; one that has finished below the root is
read from its `curves.json`, not run again. Writes a picture for each failure to `docs/paradigms/failures`, and prints
where every curve ends.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from curves import Curve, Panel, chart
from methods import Methods, slug

from alignment_modules.callbacks.tensorboard import WORKINGS

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "paradigms" / "failures"
HELD_OUT = 500  # problems of the validation split
SEED = 0
SHARE = (0.0, 1.0)
Curves = Mapping[str, Curve]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        config: Whose configuration of the quickstart is taken.
        options: What is not as it says; `{root}` stands for the folder of the chain.
        every: Optimizer steps between two validations.
        start: The stage whose policy it starts from.
    """

    config: str
    options: tuple[str, ...] = ()
    every: int = 10
    start: str = "sft"


@dataclass(frozen=True)
class Failure:
    """A failure beside what goes well.

    Attributes:
        title: Of the picture.
        runs: By the words of the legend.
        panels: Metric and title of each, and the limits of its axis.
    """

    title: str
    runs: Mapping[str, Run]
    panels: tuple[tuple[str, str, tuple[float, float]], ...]


def rate(value: str) -> tuple[str, str]:
    """The option for a learning rate."""
    return "--model.optimizer.init_args.lr", value


EXACT = ("val/exact_match", "held-out exact match", SHARE)
REWARD = ("train/reward", "train/reward", SHARE)
NO_SPREAD = ("train/frac_reward_zero_std", "train/frac_reward_zero_std", SHARE)
LOGPS = ("train/logps/chosen", "train/logps/chosen, nats", (-10.0, 0.0))
DPO = ("--data.train", "{root}/sample_pairs/predictions.jsonl")
SIMPO = (*DPO, "--model", "CPOModule", "--model.loss", "simpo", "--model.beta", "2.0")
KTO = (*DPO, "--model", "KTOModule", "--model.beta", "1.0", "--data", "UnpairedDataModule", "--data.batch_size", "64")
KTO += ("--trainer.gradient_clip_val", "null")
PRETRAINED_CRITIC = ("--data.train.init_args.size", "4800", "--model.critic_pretrain_steps", "50")  # 3,200 are left
GRPO = Run("grpo")
FAILURES: dict[str, Failure] = {
    "sft_by_heart": Failure(
        "SFT on few demonstrations, read often",
        {
            "2,048 demonstrations, 2 passes": Run("sft", every=8, start="pretrain"),
            "128 demonstrations, 32 passes": Run(
                "sft",
                ("--data.train.init_args.size", "128", "--trainer.max_epochs", "32"),
                every=4,
                start="pretrain",
            ),
        },
        (("train/loss", "train/loss", SHARE), ("val/loss", "val/loss", SHARE), EXACT),
    ),
    "dpo_rate": Failure(
        "DPO at ten times its learning rate",
        {"learning rate 1e-4": Run("dpo", DPO), "1e-3": Run("dpo", (*DPO, *rate("1e-3")))},
        (
            ("train/rewards/accuracies", "train/rewards/accuracies", SHARE),
            LOGPS,
            EXACT,
        ),
    ),
    "simpo_rate": Failure(
        "SimPO at DPO's learning rate",
        {"learning rate 1e-5": Run("dpo", (*SIMPO, *rate("1e-5"))), "1e-4": Run("dpo", (*SIMPO, *rate("1e-4")))},
        (
            ("train/rewards/margins", "train/rewards/margins", (0.0, 3.0)),
            LOGPS,
            EXACT,
        ),
    ),
    "grpo_no_signal": Failure(
        "GRPO from a policy that is never right",
        {"fine-tuned policy": GRPO, "pretrained alone": Run("grpo", start="pretrain")},
        (NO_SPREAD, REWARD, EXACT),
    ),
    "grpo_wrong_reward": Failure(
        "GRPO with rewards that say nothing of their completions",
        {
            "right rewards": GRPO,
            "shuffled rewards": Run("grpo", ("--model.rewards", "shuffled_reward.shuffled_exact_match")),
        },
        (REWARD, ("train/entropy", "train/entropy, nats", (0.0, 0.5)), EXACT),
    ),
    "grpo_rate": Failure(
        "GRPO at ten times its learning rate",
        {"learning rate 3e-4": GRPO, "3e-3": Run("grpo", rate("3e-3"))},
        (NO_SPREAD, REWARD, ("train/completions/mean_length", "train/completions/mean_length", (0.0, 6.0))),
    ),
    "ppo_critic": Failure(
        "PPO with critics that explain little, and less than nothing",
        {
            "critic at 5e-4": Run("ppo"),
            "at 5e-2": Run("ppo", ("--model.critic_optimizer.init_args.lr", "5e-2")),
            "at 5e-4 after 50 steps of its own": Run("ppo", PRETRAINED_CRITIC),
        },
        (("train/critic/explained_variance", "train/critic/explained_variance", (-1.0, 1.0)), REWARD, EXACT),
    ),
    "kto_rate": Failure(
        "KTO at ten times its learning rate",
        {
            "learning rate 3e-4": Run("dpo", (*KTO, *rate("3e-4"))),
            "3e-3": Run("dpo", (*KTO, *rate("3e-3"))),
        },
        (
            ("train/kl", "train/kl, nats", (0.0, 4.0)),
            ("train/logps/chosen", "train/logps/chosen, nats", (-40.0, 0.0)),
            EXACT,
        ),
    ),
}


class Failures(Methods):
    """The runs of one seed."""

    def curves(self, run: Run) -> Curves:
        """What a run logged, by metric; it is trained where it has not finished yet."""
        kept = self.folder(run) / "curves.json"
        if not kept.exists():
            self.chain.align("fit", run.config, *self.arguments(run))
            kept.write_text(json.dumps(logged(kept.parent)))
        return json.loads(kept.read_text())

    def folder(self, run: Run) -> Path:
        """Where a run writes."""
        return self.root / "failures" / slug("-".join((run.config, run.start, *run.options)).replace("{root}/", ""))

    def arguments(self, run: Run) -> list[str]:
        """What `align fit` is given besides the configuration."""
        options = [*run.options, *self.watched(run), "--model.policy", str(self.root / run.start / "export")]
        options += ["--trainer.default_root_dir", str(self.folder(run)), "--seed_everything", str(self.seed)]
        options += ["--data.seed", str(self.seed), "--trainer.log_every_n_steps", "2"]
        return [option.format(root=self.root) for option in options]

    def watched(self, run: Run) -> list[str]:
        """Options of the validation: greedy answers, and of SFT the likelihood of right ones."""
        rows = self.root / "failures" / "held_out.jsonl"
        if not rows.exists():
            rows.parent.mkdir(exist_ok=True)
            rows.write_text("".join(json.dumps(row) + "\n" for row in held_out()))
        options = ["--data.validation", str(rows), "--data.validation_prompts", str(HELD_OUT)]
        options += ["--trainer.val_check_interval", str(run.every), "--trainer.num_sanity_val_steps", "0"]
        options += ["--model.evaluation.num_samples", "0"]
        return [*options, "--trainer.check_val_every_n_epoch", "null"]


def held_out() -> list[dict[str, object]]:
    """Problems that no stage was trained on, with the right answer to compare with and to be likely."""
    from datamodules.tasks.addition import AdditionPrompts

    rows = AdditionPrompts(split="validation", size=HELD_OUT)
    return [rows[i] | {"completion": [{"role": "assistant", "content": rows[i]["answer"]}]} for i in range(len(rows))]


def logged(folder: Path) -> Curves:
    """Every scalar of a run's TensorBoard events by its metric, as pairs of step and value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag.removeprefix(WORKINGS): [(event.step, event.value) for event in found[tag]] for tag in found}


def draw(failure: Failure, curves: Mapping[str, Curves]) -> str:
    """The picture of a failure."""
    panels = [
        Panel(title, {name: every[metric] for name, every in curves.items() if metric in every}, limits)
        for metric, title, limits in failure.panels
    ]
    return chart(failure.title, panels)


def main() -> None:
    """Runs what has not run, draws all pictures, prints the ends of the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAILURES, nargs="+", default=list(FAILURES), help="default: all")
    parser.add_argument("--root", type=Path, default=Path("runs/accuracy"), help="default: %(default)s")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="default: %(default)s")
    arguments = parser.parse_args()
    sys.argv[1:] = []  # Lightning would take them for the arguments of its own commands

    seed = Failures(arguments.root / f"seed{SEED}", SEED)
    seed.prepare()
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    found = {name: {legend: seed.curves(run) for legend, run in FAILURES[name].runs.items()} for name in arguments.only}
    for name, curves in found.items():
        (arguments.pictures / f"{name}.svg").write_text(draw(FAILURES[name], curves))
        print(f"\n{FAILURES[name].title}: first, highest and last value")
        for metric, *_ in FAILURES[name].panels:
            for legend, every in curves.items():
                values = [value for _, value in every.get(metric, [])] or [float("nan")]
                print(f"  {metric:34} {legend:32} {values[0]:9.3f} {max(values):9.3f} {values[-1]:9.3f}")


if __name__ == "__main__":
    main()
