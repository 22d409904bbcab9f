"""A mixture through the command line: the shipped recipe, metrics of each source, and what is said of mistakes."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
QUIET = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def files(align):
    """The files that the recipe names, and demonstrations, in the folder where `align` runs."""
    lines(align.folder / "math.jsonl", [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(20)])
    lines(align.folder / "words.jsonl", [{"question": f"say {n}:"} for n in range(9)])
    for name, count in (("sums", 12), ("more", 6)):
        rows = [{"prompt": f"{n}+1=", "completion": str(n + 1), "answer": str(n + 1)} for n in range(count)]
        lines(align.folder / f"{name}.jsonl", rows)
    return align.folder


@pytest.fixture(scope="module")
def demonstrations(files, model_folder):
    """Arguments of a fit on two files of demonstrations, of which the second is given as a MixtureSource."""
    sources = {
        "sums": {"class_path": "SFTDataModule", "init_args": {"train": "sums.jsonl", "validation": 0.25}},
        "more": {
            "data": {"class_path": "SFTDataModule", "init_args": {"train": "more.jsonl", "validation": "more.jsonl"}},
            "loss_weight": 0.5,
        },
    }
    config = {
        "model": {
            "class_path": "SFTModule",
            "init_args": {
                "policy": str(model_folder),
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
            },
        },
        "data": {"class_path": "MixtureDataModule", "init_args": {"batch_size": 3, "sources": sources}},
        "trainer": {"max_epochs": 1, "log_every_n_steps": 1, "default_root_dir": "demonstrations"},
    }
    (files / "demonstrations.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return (f"--config={files / 'demonstrations.yaml'}", *QUIET)


def recipe(model_folder):
    configs = [f"--config={CONFIGS / name}" for name in ("recipes/grpo.yaml", "data/mixture.yaml")]
    short = ("--model.num_generations=2", "--model.max_completion_length=40", "--trainer.max_steps=2")
    return (*configs, f"--model.policy.path={model_folder}", *short, *QUIET)


def test_the_recipe_trains_each_source_on_its_own_rewards(align, files, model_folder):
    cli = align("fit", *recipe(model_folder), "--trainer.default_root_dir=recipe", "--trainer.val_check_interval=1")
    metrics = cli.trainer.callback_metrics
    assert {"train/math/reward", "train/words/reward", "val/math/exact_match", "val/exact_match"} <= metrics.keys()
    assert "train/math/rewards/exact_match/mean" in metrics
    assert "train/words/rewards/exact_match/mean" not in metrics
    assert "train/math/rewards/regex_match/mean" not in metrics
    assert metrics["train/words/completions/mean_length"] <= 32
    assert cli.datamodule.plan.shares == (3, 1)
    card = (align.folder / "recipe" / "export" / "README.md").read_text()
    assert "| train/math | `math.jsonl` | 18 |" in card
    assert "| train/words | `words.jsonl` | 9 |" in card
    saved = align("fit", f"--config={align.folder / 'recipe' / 'config.yaml'}", "--trainer.default_root_dir=again")
    assert saved.trainer.callback_metrics["train/loss"] == metrics["train/loss"]


def test_the_header_gives_the_launch_command():
    lines = (CONFIGS / "data" / "mixture.yaml").read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert "align fit --config grpo --config data/mixture --model.policy.path MODEL" in header
    options = [line.strip(" -") for line in lines if line.strip() and not line.startswith("#")]
    bare = [one for one in options if "#" not in one and not one.endswith(":") and "class_path" not in one]
    assert not bare


def test_validation_of_each_source_and_of_all(align, demonstrations):
    """The whole is the mean over the rows of both, weighted as in training."""
    metrics = align("fit", *demonstrations).trainer.callback_metrics
    alone = {}
    for name, share in (("sums", 0.25), ("more", "more.jsonl")):
        cli = align(
            "validate",
            f"--config={align.folder / 'demonstrations.yaml'}",
            *QUIET,
            f"--model.policy={align.folder / 'demonstrations' / 'export'}",
            "--data=SFTDataModule",
            f"--data.train={name}.jsonl",
            f"--data.validation={share}",
        )
        alone[name] = (float(cli.trainer.callback_metrics["val/loss"]), cli.datamodule.reports["validation"]["targets"])
        assert float(metrics[f"val/{name}/loss"]) == pytest.approx(alone[name][0], abs=1e-5)
    (sums, first), (more, second) = alone["sums"], alone["more"]
    assert float(metrics["val/loss"]) == pytest.approx(
        (sums * first + 0.5 * more * second) / (first + 0.5 * second), abs=1e-5
    )
    assert not [name for name in metrics if "dataloader_idx" in name]


def test_half_and_half_is_what_both_halves_are_apart(align, demonstrations):
    """A run on the halves of a file in one mixture, all rows in each step, is the run on the file."""
    rows = [json.loads(line) for line in (align.folder / "sums.jsonl").read_text().splitlines()]
    lines(align.folder / "first.jsonl", rows[:6])
    lines(align.folder / "second.jsonl", rows[6:])
    config = yaml.safe_load((align.folder / "demonstrations.yaml").read_text())
    halves = {
        name: {"class_path": "SFTDataModule", "init_args": {"train": f"{name}.jsonl"}} for name in ("first", "second")
    }
    weights = []
    for data in (
        {"class_path": "MixtureDataModule", "init_args": {"batch_size": 12, "sources": halves}},
        {"class_path": "SFTDataModule", "init_args": {"batch_size": 12, "train": "sums.jsonl"}},
    ):
        (align.folder / "whole.yaml").write_text(yaml.safe_dump(config | {"data": data}))
        cli = align("fit", f"--config={align.folder / 'whole.yaml'}", *QUIET, "--trainer.max_epochs=3")
        assert cli.trainer.global_step == 3
        weights.append([p.detach().clone() for p in cli.model.parameters()])
    assert all((one - other).abs().max() < 1e-6 for one, other in zip(*weights, strict=True))


def test_a_run_that_goes_on_is_the_run_that_never_stopped(align, demonstrations):
    """Stopped in the middle of the second epoch."""
    few = ("--trainer.max_epochs=2", "--checkpoints.every_n_steps=7")
    whole = align("fit", *demonstrations, *few, "--trainer.default_root_dir=whole")
    align("fit", *demonstrations, *few, "--trainer.default_root_dir=parts", "--trainer.max_steps=7")
    again = align("fit", *demonstrations, *few, "--trainer.default_root_dir=parts", "--ckpt_path=last")
    assert whole.trainer.global_step == again.trainer.global_step == 10
    assert all(map(torch.equal, whole.model.state_dict().values(), again.model.state_dict().values()))


def test_inspect_shows_each_source(align, demonstrations):
    from alignment_modules.cli.commands import run_command

    out = io.StringIO()
    with contextlib.chdir(align.folder), contextlib.redirect_stdout(out):
        assert run_command("inspect", [*demonstrations, "--rows=3"]) == 0
    for part in ("Rows of train/sums", "Rows of train/more", "Rows of validation/more", "source_name", "batches"):
        assert part in out.getvalue(), out.getvalue()


def test_test_and_predict(align, demonstrations):
    rows = ("--data.sources.sums.init_args.test=sums.jsonl", "--data.sources.sums.init_args.predict=more.jsonl")
    more = (
        "--data.sources.more.data.init_args.test=more.jsonl",
        "--data.sources.more.data.init_args.predict=more.jsonl",
    )
    made = ("--model.evaluation.max_completion_length=2", "--trainer.default_root_dir=tested", *rows, *more)
    metrics = align("test", *demonstrations, *made).trainer.callback_metrics
    assert {"test/sums/exact_match", "test/more/exact_match", "test/exact_match"} <= metrics.keys()
    align("predict", *demonstrations, *made)
    found = [json.loads(line) for line in (align.folder / "tested" / "predictions.jsonl").read_text().splitlines()]
    assert [row["source_name"] for row in found] == ["sums"] * 6 + ["more"] * 6
    assert [row["index"] for row in found] == list(range(12))


NEW = ("--data", "MixtureDataModule")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--data.sources.sums.init_args.batchsize=3"],
            ["--data.sources.sums.batchsize=3: SFTDataModule has no option", "'batch_size'?"],
        ),
        (
            ["--data.sources.more.lossweight=3"],
            ["--data.sources.more.lossweight=3: MixtureSource has no option", "'loss_weight'?"],
        ),
        (["--data.sources.more.loss_weight=no"], ["--data.sources.more.loss_weight=no: must be a finite number > 0"]),
        (
            ["--data.sources.more.data.init_args.loss_on=no"],
            ["--data.sources.more.data.loss_on=no: must be 'completion' or"],
        ),
        (
            ["--data.sources.more.data=SFTDataModul"],
            ["--data.sources.more.data=SFTDataModul", "did you mean 'SFTDataModule'?"],
        ),
        (['--data.sources={"a": 3}'], ["--data.sources.a=3: must be"]),
        (['--data.sources={"a": {"weight": 3}}'], ["--data.sources.a=", "has no `data`"]),
        (
            ["--data.train=x.jsonl"],
            ["--data.train=x.jsonl: MixtureDataModule has no option 'train'", "allowed: sources"],
        ),
    ],
)
def test_mistakes_are_told_by_option(align, demonstrations, arguments, parts, capsys):
    with pytest.raises(SystemExit) as stopped:
        align("fit", *demonstrations, *arguments)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert [part for part in parts if part not in text] == [], text
    assert len(text.splitlines()) <= 6, text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.sources.sums.init_args.train=nowhere.jsonl"], "source 'sums': train='nowhere.jsonl': no such file"),
        (["--data.sources.more.data.init_args.batch_size=5"], "source 'more': batch_size=5 has no effect"),
        (["--data.temperature=0"], "temperature=0.0 must be a finite number of 1 or more"),
        (["--data.sources.more.weight=2"], "source 'more' has a weight and source 'sums' has none"),
        (["--data.sources.more.rewards=[exact_match]"], r"source 'more': rewards=\['exact_match'\] has no effect"),
    ],
)
def test_what_does_not_fit_together_is_told_by_source(align, demonstrations, arguments, message):
    with pytest.raises(ValueError, match=message):
        align("fit", *demonstrations, *arguments)


def test_commands_without_rows(align, demonstrations):
    with pytest.raises(
        ValueError, match=r"data.sources: `align test` needs rows, and none of sums, more has test rows"
    ):
        align("test", *demonstrations)


def test_sources_on_the_command_line(align, demonstrations, model_folder):
    given = ("--model=SFTModule", f"--model.policy={model_folder}", "--model.optimizer=torch.optim.SGD", *QUIET, *NEW)
    sources = ("--data.sources.sums=SFTDataModule", "--data.sources.sums.train=sums.jsonl")
    assert align("fit", *given, *sources, "--trainer.max_steps=1").trainer.global_step == 1
    with pytest.raises(ValueError, match=r"data.sources.sums.data: a source begins with its data module, as in"):
        align("fit", *given, "--data.sources.sums.data=SFTDataModule")


def test_help_of_a_source(capsys, align):
    with pytest.raises(SystemExit):
        align("fit", "--data.sources.help")
    text = capsys.readouterr().out
    for option in ("data", "weight", "epochs", "loss_weight", "rewards", "max_completion_length"):
        assert f"\n  {option} " in text
    assert "--data.sources.rewards.help" not in text


def test_rewards_that_are_none_of_the_modules(align, files, model_folder):
    with pytest.raises(ValueError, match=r"source 'math'.*'exact'.*exact_match, regex_match"):
        align("fit", *recipe(model_folder), "--data.sources.math.rewards=[exact]")
    with pytest.raises(ValueError, match=r"source 'words'.*completion_limits=99"):
        align("fit", *recipe(model_folder), "--data.sources.words.max_completion_length=99")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.betta=3"], "--model.betta=3: GRPOModule has no option 'betta'; did you mean 'beta'?"),
        (
            ["--data.sources.words.wieght=3"],
            "--data.sources.words.wieght=3: MixtureSource has no option 'wieght'; did you mean 'weight'?",
        ),
    ],
)
def test_a_mistake_beside_the_recipe_is_named(align, files, capfd, arguments, message):
    recipes = (f"--config={CONFIGS / name}" for name in ("recipes/grpo.yaml", "data/mixture.yaml"))
    with pytest.raises(SystemExit):
        align("fit", *recipes, "--model.policy.path=nowhere", *arguments)
    assert message in capfd.readouterr().err
