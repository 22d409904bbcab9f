"""Every shipped configuration runs: recipes with the user's model and data, overlays on recipes, the quickstart."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.paradigms import ROWS

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {path.stem: path for path in sorted((CONFIGS / "recipes").glob("*.yaml"))}
OVERLAYS = {path.stem: path for path in sorted((CONFIGS / "strategies").glob("*.yaml"))}
QUICKSTART = {path.stem: path for path in sorted((CONFIGS / "quickstart").glob("*.yaml"))}
QUIET = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)
SHORT = {name: row.recipe.get("short", ()) for name, row in ROWS.items()}


@pytest.fixture
def recipe(model_folder, data):
    """Arguments of a recipe as its header gives them, with overlays stacked on it."""

    def arguments(name, *overlays):
        configs = [f"--config={path}" for path in (RECIPES[name], *(OVERLAYS[overlay] for overlay in overlays))]
        needs = [f"--model.{key}={model_folder}" for key in ROWS[name].needs]
        paths = [f"--model.policy.path={model_folder}", *needs, f"--data.train={data[name]}"]
        return [*configs, *paths, *SHORT.get(name, ())]

    return arguments


def printed(align, *arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        align(*arguments, "--print_config")
    assert stopped.value.code == 0
    return out.getvalue()


def test_there_is_a_recipe_for_every_paradigm():
    assert set(RECIPES) == set(ROWS)
    assert {"lora", "ddp", "fsdp2", "bf16"} <= set(OVERLAYS)


@pytest.mark.parametrize("path", [*RECIPES.values(), *OVERLAYS.values()], ids=lambda path: path.stem)
def test_header_gives_the_launch_command(path):
    header = "".join(line.lstrip("#").strip(" ") for line in path.read_text().splitlines(True) if line.startswith("#"))
    command = header[header.index("align fit") :].split("\n\n")[0]
    assert f"--config {path.stem} " in command
    assert "--model.policy.path MODEL" in command
    assert "--data.train data.jsonl" in command


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_of_a_recipe_is_explained(name):
    lines = RECIPES[name].read_text().splitlines()
    for line in lines[next(i for i, line in enumerate(lines) if not line.startswith("#")) :]:
        option = line.strip(" -")
        if option and not option.startswith("#") and not option.endswith(":") and "class_path" not in option:
            assert "#" in option, f"{name}.yaml: no comment on {option!r}"


def peak_rates(module):
    """The learning rate of each trained parameter of the policy, before any schedule."""
    names = {id(p): part for part, p in module.policy.named_parameters()}
    groups = [group for optimizer in module.trainer.optimizers for group in optimizer.param_groups]
    found = [(names.get(id(p)), group.get("initial_lr", group["lr"])) for group in groups for p in group["params"]]
    return {part: rate for part, rate in found if part is not None}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("overlays", [(), *((overlay,) for overlay in OVERLAYS), tuple(OVERLAYS)], ids="+".join)
def test_recipe_and_overlays_run(align, recipe, name, overlays):
    cli = align("fit", *recipe(name, *overlays), *QUIET, "--trainer.fast_dev_run=1")
    assert cli.trainer.global_step == 1
    trained = [name for name, p in cli.model.policy.named_parameters() if p.requires_grad]
    adapters = all("lora" in part or "modules_to_save" in part for part in trained)  # a fresh head is trained whole
    assert adapters == ("lora" in overlays)
    usual = yaml.safe_load(RECIPES[name].read_text())["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    times = {part: 10 if "lora" in overlays and ".lora_" in part else 1 for part in trained}
    assert peak_rates(cli.model) == {part: pytest.approx(usual * times[part]) for part in trained}
    if "bf16" in overlays:
        assert cli.trainer.precision == "bf16-mixed"
    strategy = type(cli.trainer.strategy).__name__
    if {"ddp", "fsdp2"} & set(overlays):  # the later one wins
        assert strategy == ("FSDP2Strategy" if "fsdp2" in overlays else "DDPStrategy")


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "lightning.pytorch.strategies.FSDPStrategy"])
def test_other_ways_to_shard_are_refused_before_anything_is_built(align, recipe, strategy):
    with pytest.raises(ValueError, match=r"is not supported.*Use strategy='fsdp2'"):
        align("fit", *recipe("sft"), *QUIET, f"--trainer.strategy={strategy}")


def test_adapters_at_the_rate_of_all_weights_are_said(align, recipe):
    short = (*QUIET, "--trainer.fast_dev_run=1", "--model.policy.lora.lr_ratio=1")
    with pytest.warns(UserWarning, match="learning rate of the adapters is 1e-06, about that of fine-tuning all"):
        align("fit", *recipe("dpo", "lora"), *short)


def test_a_saved_adapter_is_trained_further_held_to_what_it_was(align, recipe, tmp_path):
    """The chain of two stages on one base, whose first exports its adapter alone."""
    few = (*QUIET, "--trainer.max_steps=1", "--export.lora=adapter")
    align("fit", *recipe("sft", "lora"), *few, f"--trainer.default_root_dir={tmp_path / 'sft'}")
    options = [option for option in recipe("dpo") if not option.startswith("--model.policy")]
    for part in ("policy", "reference"):
        options += [f"--model.{part}.path={tmp_path / 'sft' / 'export'}", f"--model.{part}.merge_adapter=false"]
    cli = align("fit", *options, *few, f"--trainer.default_root_dir={tmp_path / 'dpo'}")
    assert cli.model.reference.adapter == "reference"
    assert float(cli.trainer.callback_metrics["train/rewards/margins"]) == 0
    named = [json.loads((tmp_path / stage / "export" / "adapter_config.json").read_text()) for stage in ("sft", "dpo")]
    assert named[0]["base_model_name_or_path"] == named[1]["base_model_name_or_path"]
    again = align("fit", f"--config={tmp_path / 'dpo' / 'config.yaml'}", f"--trainer.default_root_dir={tmp_path / 'b'}")
    assert again.model.reference.adapter == "reference"


@pytest.mark.parametrize("name", RECIPES)
def test_printed_configuration_says_the_same_again(align, recipe, name, tmp_path):
    first = printed(align, "fit", *recipe(name, "lora"), *QUIET)
    assert yaml.safe_load(first)["model"]["init_args"]["policy"]["lora"]["r"] == 16
    (tmp_path / "all.yaml").write_text(first)
    assert printed(align, "fit", f"--config={tmp_path / 'all.yaml'}") == first


def test_rewards_of_every_form_reproduce_the_run(align, recipe, model_folder, tmp_path, recwarn):
    """The saved configuration is the whole run, in every form that rewards take; the checkpoint holds plain values."""
    (align.folder / "own_rewards.py").write_text(
        "def length(completions):\n    return [-len(c) for c in completions]\n"
    )
    verifier = {"class_path": "alignment_modules.rewards.ExactMatch", "init_args": {"column": "answer"}}
    few = ("--trainer.max_steps=1", "--model.num_generations=2")
    for number, (rewards, names) in enumerate(
        [
            ((), ("exact_match",)),
            (("--model.rewards+=own_rewards.length",), ("exact_match", "length")),
            (("--model.rewards=own_rewards.length",), ("length",)),
            ((f"--model.rewards={json.dumps(['own_rewards.length', verifier])}",), ("length", "exact_match")),
            ((f"--model.rewards={json.dumps(verifier)}",), ("exact_match",)),
        ]
    ):
        roots = [tmp_path / f"{number}{name}" for name in "ab"]
        first = align("fit", *recipe("grpo"), *QUIET, *few, *rewards, f"--trainer.default_root_dir={roots[0]}")
        again = align("fit", f"--config={roots[0] / 'config.yaml'}", f"--trainer.default_root_dir={roots[1]}")
        assert first.model.rewards.names == again.model.rewards.names == names
        saved = [yaml.safe_load((root / "config.yaml").read_text())["model"] for root in roots]
        assert saved[0] == saved[1]
        written = [yaml.safe_load((root / "hparams.yaml").read_text())["rewards"] for root in roots]
        [checkpoint] = roots[0].glob("checkpoints/*.ckpt")
        held = torch.load(checkpoint, weights_only=True)["hyper_parameters"]["rewards"]
        assert written == [saved[0]["init_args"]["rewards"]] * 2 == [held] * 2
    assert not [warning for warning in recwarn if "Unable to serialize" in str(warning.message)]


def test_the_saved_configuration_names_the_checkpoint_it_resumed_from(align, recipe, tmp_path):
    fit = ["fit", *recipe("sft"), *QUIET, f"--trainer.default_root_dir={tmp_path}"]
    align(*fit, "--trainer.max_steps=1")
    [first] = tmp_path.glob("checkpoints/*.ckpt")
    align(*fit, "--trainer.max_steps=2", "--ckpt_path=last")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["ckpt_path"] == str(first)
    assert config["trainer"]["logger"] is None  # a run in another folder logs there


def test_a_schedule_on_a_plateau(align, recipe):
    plateau = ("--model.lr_scheduler=ReduceLROnPlateau", "--model.lr_scheduler.monitor=train/loss")
    cli = align("fit", *recipe("sft"), *QUIET, *plateau, "--trainer.max_epochs=1")
    [config] = cli.trainer.lr_scheduler_configs
    assert type(config.scheduler).__name__ == "ReduceLROnPlateau"
    assert config.monitor == "train/loss"


def test_the_command_line_wins_over_files(align, recipe):
    options = ("--model.beta=0.3", "--model.optimizer.lr=0.5", "--trainer.max_steps=7")
    config = yaml.safe_load(printed(align, "fit", *recipe("dpo"), *options))
    assert config["model"]["init_args"]["beta"] == 0.3
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5
    assert config["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0.0  # the recipe's
    assert config["trainer"]["max_steps"] == 7


def test_fit_resume_chain_and_evaluate(align, recipe, data):
    """What a user does with one recipe after the other, and what lies where afterwards."""
    fit = ["fit", *recipe("sft"), f"--data.validation={data['sft']}", *QUIET, "--trainer.log_every_n_steps=1"]
    first = align(*fit, "--trainer.max_epochs=1").trainer
    checkpoint = first.checkpoint_callback.best_model_path
    assert Path(checkpoint).parent == Path("runs/sft/checkpoints")
    resumed = align(*fit, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}").trainer
    assert (first.global_step, resumed.global_step) == (3, 6)
    assert resumed.callback_metrics["train/num_tokens"] == 2 * first.callback_metrics["train/num_tokens"]
    assert "val/loss" in resumed.callback_metrics
    assert (align.folder / "runs/sft/export/config.json").exists()

    chained = ["--model.policy.path=runs/sft/export", *QUIET]
    evaluation = ["--model.evaluation.max_completion_length=4", "--model.evaluation.num_samples=2"]
    base = [f"--config={RECIPES['dpo']}", *chained]
    validated = align("validate", *base, f"--data.validation={data['dpo']}").trainer.callback_metrics
    assert float(validated["val/loss"]) == pytest.approx(0.6931, abs=1e-4)
    tested = align("test", *base, *evaluation, f"--data.test={data['grpo']}").trainer.callback_metrics
    assert 0 <= tested["test/exact_match"] <= 1
    assert {"test/exact_match", "test/pass@2", "test/completions/mean_length"} <= tested.keys()
    align("predict", *base, *evaluation, f"--data.predict={data['grpo']}")
    rows = [json.loads(line) for line in (align.folder / "runs/dpo/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == len(Path(data["grpo"]).read_text().splitlines())
    assert all(len(row["completions"]) == len(row["rewards"]) == 2 for row in rows)


@pytest.mark.slow
@pytest.mark.distributed
def test_ddp_overlay_on_two_processes(recipe, tmp_path):
    command = [sys.executable, "-m", "alignment_modules", "fit", *recipe("sft", "ddp"), *QUIET, "--trainer.devices=2"]
    with subprocess.Popen(
        [*command, "--trainer.max_epochs=1"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=300)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the second process too
    assert process.returncode == 0, errors[-4000:]
    assert (tmp_path / "runs/sft/export/model.safetensors").exists()
    [checkpoint] = (tmp_path / "runs/sft/checkpoints").iterdir()
    assert "step=2" in checkpoint.name  # 24 rows in batches of 8 on each of two processes


# The quickstart's configurations start from what the stage before left in `runs/`.


def strings(tree):
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from strings(value)
    elif isinstance(tree, str):
        yield tree


def chain_order():
    """Names of the quickstart's configurations, each after those whose folders it reads."""
    configs = {name: yaml.safe_load(path.read_text()) for name, path in QUICKSTART.items()}
    made_by = {config["trainer"]["default_root_dir"]: name for name, config in configs.items()}
    needs = {
        name: {made_by[f] for text in strings({**config, "trainer": None}) for f in made_by if text.startswith(f + "/")}
        for name, config in configs.items()
    }
    order = []
    while len(order) < len(needs):
        ready = [name for name in needs if name not in order and needs[name] <= set(order)]
        assert ready, f"the quickstart's configurations need each other in a circle: {needs}"
        order += ready
    return order


def small(name):
    """The subcommand of a quickstart's configuration, and arguments that make its task small."""
    sources = yaml.safe_load(QUICKSTART[name].read_text())["data"]["init_args"]
    made = [split for split, source in sources.items() if isinstance(source, dict) and "size" in source["init_args"]]
    sizes = [f"--data.{split}.init_args.size=16" for split in made]
    command = "fit" if "train" in sources else "predict"
    return command, [f"--config={QUICKSTART[name]}", *QUIET, *sizes]


@pytest.fixture(scope="module")
def chained(align):
    """Runs every stage for one step, so that each leaves what the next one reads; each question gets a right answer."""
    for name in chain_order():
        command, arguments = small(name)
        if command == "fit":
            arguments += ["--model.lr_scheduler=null", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
        align(command, *arguments)
        predictions = align.folder / "runs/quickstart" / name / "predictions.jsonl"
        if predictions.exists():  # an untrained policy gives ties, and no pairs can be made of those
            rows = [json.loads(line) for line in predictions.read_text().splitlines()]
            rows = [row | {"rewards": [1.0, *row["rewards"][1:]]} for row in rows]
            rows = [row | {"completions": [row["answer"], *row["completions"][1:]]} for row in rows]
            predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return align


@pytest.mark.parametrize("name", QUICKSTART)
def test_quickstart_runs(chained, name):
    command, arguments = small(name)
    trainer = chained(command, *arguments, "--trainer.fast_dev_run=1").trainer
    assert trainer.state.finished
    assert command != "fit" or trainer.global_step == 1


@pytest.mark.parametrize("name", [name for name in QUICKSTART if "test:" in QUICKSTART[name].read_text()])
def test_quickstart_tests(chained, name):
    _, arguments = small(name)
    metrics = chained("test", *arguments).trainer.callback_metrics
    assert {"test/exact_match", "test/pass@8"} <= metrics.keys()


@pytest.mark.parametrize("name", QUICKSTART)
def test_quickstart_prints_its_configuration(align, name):
    command, arguments = small(name)
    assert yaml.safe_load(printed(align, command, *arguments))["seed_everything"] == 0
