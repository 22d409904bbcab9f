"""Recipes go by name wherever a configuration is named; a file of the user's comes first; nothing else is guessed."""

from pathlib import Path

import pytest
import yaml

from alignment_modules.cli.recipes import about, find_config, recipes
from tests.configs.test_configs import printed

CONFIGS = Path(__file__).parents[2] / "configs"


def options(align, *arguments):
    return yaml.safe_load(printed(align, "fit", *arguments))


@pytest.fixture
def mine(align):
    """Writes files into the user's folder, and takes them away."""
    written = []

    def write(name, text):
        path = align.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        written.append(path)
        return path

    yield write
    for path in written:
        path.unlink()


def test_every_shipped_configuration_has_a_name_of_its_own():
    assert sorted(recipes().values()) == sorted(CONFIGS.glob("*/*.yaml"))
    expected = {"sft", "online_dpo", "lora", "fsdp2", "quickstart/sft", "environments/grpo", "data/mixture"}
    assert expected | {"engines/vllm"} <= set(recipes())
    assert all(path.stem == name.rpartition("/")[2] for name, path in recipes().items())


@pytest.mark.parametrize("path", recipes().values(), ids=list(recipes()))
def test_its_first_sentence_fits_a_line(path):
    assert 20 < len(about(path)) <= 94


@pytest.mark.parametrize("form", [["--config", "sft"], ["--config=sft"], ["-c", "sft"]])
def test_a_name_is_its_file(align, form):
    assert options(align, *form) == options(align, f"--config={CONFIGS / 'recipes' / 'sft.yaml'}")


def test_names_are_stacked_with_files_and_options(align, mine):
    mine("own.yaml", "trainer: {max_epochs: 7}\n")
    config = options(align, "--config=dpo", "--config", "own.yaml", "--config=lora", "--model.policy.path=x")
    assert config["trainer"]["max_epochs"] == 7
    assert config["trainer"]["default_root_dir"] == "runs/dpo"
    assert config["model"]["init_args"]["policy"]["lora"]["r"] == 16


def test_a_file_of_the_users_wins_and_a_folder_does_not(align, mine):
    assert options(align, "--config=sft")["trainer"]["default_root_dir"] == "runs/sft"
    mine("grpo/notes.txt", "")
    assert options(align, "--config=grpo")["trainer"]["default_root_dir"] == "runs/grpo"
    mine("sft", "trainer: {default_root_dir: mine}\n")
    assert options(align, "--config=sft")["trainer"]["default_root_dir"] == "mine"


def test_a_file_builds_on_a_recipe(align, mine):
    mine(
        "sub/own.yaml",
        "trainer: {max_epochs: 7}\nmodel: {init_args: {optimizer: {init_args: {lr: 1e-3}}}}\nconfig: sft\n",
    )
    same = ["--config=sft", "--trainer.max_epochs=7", "--model.optimizer.lr=1e-3"]
    assert options(align, "--config=sub/own.yaml") == options(align, *same)
    mine("sub/sft", "trainer: {default_root_dir: mine}\n")  # beside the file that names it
    assert options(align, "--config=sub/own.yaml")["trainer"]["default_root_dir"] == "mine"


def test_a_file_builds_on_several_each_over_the_one_before(align, mine, tmp_path):
    mine("one.yaml", "{config: [dpo, lora], trainer: {max_epochs: 7, max_steps: 5}}\n")
    mine("two.yaml", "config: one.yaml\ntrainer: {max_epochs: 8}\n")
    config = options(align, "--config=two.yaml", "--model.policy.path=x")
    assert config["trainer"]["default_root_dir"] == "runs/dpo"
    assert (config["trainer"]["max_epochs"], config["trainer"]["max_steps"]) == (8, 5)
    assert config["model"]["init_args"]["policy"]["lora"]["r"] == 16


@pytest.mark.parametrize("value", ["{model: SFTModule}", "s3://bucket/sft", "sft: {", "{a: 1"])
def test_what_is_no_name_is_left_alone(value, tmp_path):
    assert find_config(value, tmp_path) == value


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--config=sfft"],
            ["--config=sfft: there is no such file, and no recipe", "did you mean 'sft'?", "  allowed: "],
        ),
        (["--config", "mixture"], ["did you mean 'data/mixture'?"]),
        (["--config=quickstart/stf"], ["did you mean 'quickstart/sft'?"]),
        (["-c", "recipes/dpo.yaml"], ["did you mean 'dpo' or 'quickstart/dpo'?"]),
        (["--config=zzzzzzz"], ["of this name\n", "align list recipes"]),
        (["--config="], ["--config=: there is no such file"]),
        (["--config=sft", "--config=own.yml"], ["--config=own.yml: there is no such file"]),
        (["--config=names.yaml"], ["names.yaml: config=lorra: there is no such file", "did you mean 'lora'?"]),
        (["--config=number.yaml"], ["number.yaml: config=3: must be the name or path of a configuration"]),
        (["--config=circle.yaml"], ["circle.yaml: config=circle.yaml: names itself: "]),
    ],
)
def test_other_names_are_refused(align, mine, arguments, told, capsys):
    for name, named in (("names", "lorra"), ("number", "[sft, 3]"), ("circle", "circle.yaml")):
        mine(f"{name}.yaml", f"config: {named}\n")
    with pytest.raises(SystemExit) as stopped:
        align("fit", *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert all(part in error for part in told), error


def test_where_a_package_holds_them_they_are_found_there(monkeypatch, tmp_path):
    import alignment_modules

    (tmp_path / "alignment_modules" / "configs" / "recipes").mkdir(parents=True)
    held = tmp_path / "alignment_modules" / "configs" / "recipes" / "one.yaml"
    held.write_text("# A recipe.\n")
    monkeypatch.setattr(alignment_modules, "__file__", str(tmp_path / "alignment_modules" / "__init__.py"))
    assert recipes() == {"one": held}
