"""The README says what is true: its commands and code run, its formats are read, its metrics are those logged."""

import contextlib
import glob
import io
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest

from alignment_modules.callbacks.tensorboard import tag_of
from alignment_modules.cli.commands import COMMANDS, run_command
from alignment_modules.policies import PolicyConfig, build_policy
from tests.models import MIXTRAL
from tests.paradigms import ROWS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
SUMS = [(a, b) for a in range(6) for b in range(4)]
FILES = {
    "documents.jsonl": [{"text": f"{a}+{b}={a + b}"} for a, b in SUMS],
    "demonstrations.jsonl": [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a, b in SUMS],
    "pairs.jsonl": [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + 1}"} for a, b in SUMS],
    "labelled.jsonl": [{"prompt": f"{a}+{b}=", "completion": f"{a + b}", "label": a % 2 == 0} for a, b in SUMS],
    "questions.jsonl": [{"prompt": f"{a}+{b}=", "answer": f"{a + b}"} for a, b in SUMS],
}
QUIET = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false")
PARADIGMS = {name: row.source for name, row in ROWS.items()}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text):
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def table(section):
    """Rows of the first table below a heading, as lists of cells."""
    body = README.split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def titled(text, language):
    """Blocks that begin with a comment naming their file, by that name."""
    found = (re.match(r"# (\S+\.\w+)\n", block) for block in blocks(text, language))
    return {match[1]: match.string for match in found if match}


@pytest.fixture(scope="session")
def workplace(model_folder, tmp_path_factory):
    """A user's folder: the repository's `configs/`, a model, the data files and the README's own files."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name, rows in FILES.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, block in (titled(README, "python") | titled(README, "yaml")).items():
        (folder / name).write_text(block)
    (folder / "my-model").symlink_to(model_folder)
    write_experts(folder / "my-model-of-experts", model_folder)
    return folder


def write_experts(folder, dense):
    """A mixture of experts that asks to be balanced, with the tokenizer of a dense model."""
    shutil.copytree(dense, folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    build_policy(PolicyConfig(config=MIXTRAL | {"vocab_size": vocabulary})).save_pretrained(folder)


@pytest.fixture
def align(workplace, monkeypatch):
    """Runs `align` in this process, in the user's folder, and leaves the process as it was."""
    from alignment_modules.cli import run_cli

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "path", [str(workplace), *sys.path])
    monkeypatch.setattr(sys, "argv", ["align"])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another folder's, of another test
    environment = dict(os.environ)
    yield run_cli
    os.environ.clear()
    os.environ.update(environment)


def check_script(arguments):
    """A script of the repository has the options that a command gives it."""
    if arguments[:2] == ["-m", "venv"]:
        return
    script = ROOT / arguments[0]
    usage = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    for option in (word for word in arguments if word.startswith("--")):
        assert f"{option} " in usage, f"{script} has no {option}"


def test_every_command_runs_in_the_order_of_the_text(align, monkeypatch):
    """Runs what the text gives, with rollouts kept short."""
    given = commands(README)
    named = {line.split()[1] for line in given if line.startswith("align")}
    assert named == {"fit", "validate", "test", "predict", *COMMANDS}
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+1=\n/quit\n"))  # what is said in `align chat`
    for line in given:
        program, *arguments = shlex.split(line)
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            continue
        if program == "python":  # tests/test_benchmarks.py runs them
            check_script(arguments)
            continue
        assert program == "align"
        arguments = [path for word in arguments for path in (sorted(glob.glob(word)) if "*" in word else [word])]
        if any(stop in arguments for stop in ("--print_config", "--model.help")):
            with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stopped:
                align(arguments)
            assert stopped.value.code == 0
            assert out.getvalue()
            continue
        if arguments[0] in COMMANDS:
            assert run_command(arguments[0], arguments[1:]) == 0, line
            continue
        quick = ["--model.max_completion_length=4"] if "grpo.yaml" in line else []
        trainer = align([*arguments, *QUIET, *quick]).trainer
        assert trainer.state.finished, line
    written = ["predictions.jsonl", "test.jsonl", "export/README.md"]
    assert all(list(Path("runs").glob(f"sft*/{name}")) for name in written)  # a later command moved a run aside
    assert Path("made-pairs.jsonl").exists()
    assert Path("runs/dpo-lora/export/config.json").exists()
    assert list(Path("runs").glob("grpo*/samples.jsonl"))
    assert list(Path("runs").glob("grpo*/samples.html"))


@pytest.mark.parametrize("block", blocks(README, "python"), ids=range(len(blocks(README, "python"))))
def test_python_blocks_run(block, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_yaml_blocks_name_their_files_and_are_used():
    assert len(titled(README, "yaml")) == len(blocks(README, "yaml"))
    for name in titled(README, "yaml"):
        assert any(name in line for line in commands(README))


def test_paths_exist():
    """Every path below a folder of the repository, in README and CONTRIBUTING, but for those that the example adds."""
    added = set(titled(CONTRIBUTING, "python") | titled(CONTRIBUTING, "yaml"))
    found = re.findall(
        r"\b(?:tests|configs|examples|benchmarks|alignment_modules|datamodules)/[\w./]*", README + CONTRIBUTING
    )
    assert len(found) > 20
    for path in {path.rstrip(".") for path in found} - added:
        assert (ROOT / path).exists(), path


def test_the_table_of_modules(workplace):
    import inspect

    import datamodules
    from alignment_modules import get_module_class

    rows = table("Modules")
    assert [names(row[0])[0] for row in rows] == list(PARADIGMS)
    for paradigm, cls, data, keys, options in rows:
        module = get_module_class(names(paradigm)[0])
        assert names(cls) == [module.__name__]
        accepted = {name for base in module.__mro__ if "__init__" in vars(base) for name in parameters(base, inspect)}
        assert set(names(options)) <= accepted
        source = FILES[f"{PARADIGMS[names(paradigm)[0]]}.jsonl"]
        made = getattr(datamodules, names(data)[0])(train=source, tokenizer=str(workplace / "my-model"), batch_size=2)
        made.setup("fit")
        batch = next(iter(made.train_dataloader()))
        listed = set(names(keys))
        if "*_attention_mask" in listed:
            listed |= {name.replace("input_ids", "attention_mask") for name in listed if name.endswith("input_ids")}
        assert set(batch) - {"index", "answer"} <= listed


def parameters(cls, inspect):
    return [name for name, p in inspect.signature(cls.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY]


FORMATS = table("Bring your data")


def test_every_format_is_in_the_table():
    from datamodules.rows import formats

    assert {row[0] for row in FORMATS} == set(formats.COLUMNS)


@pytest.mark.parametrize("row", FORMATS, ids=[row[0] for row in FORMATS])
def test_formats(row, workplace):
    import datamodules
    from datamodules.rows import formats

    line = json.loads(names(row[1])[0])
    assert formats.recognise(line) == row[0]
    classes = ("PretrainDataModule", "SFTDataModule", "PreferenceDataModule", "UnpairedDataModule", "PromptDataModule")
    for name, says in zip(classes, row[2:], strict=True):
        data = getattr(datamodules, name)(train=[line], tokenizer=str(workplace / "my-model"), chat_template="plain")
        if says == "yes":
            data.setup("fit")
            assert len(data.train_dataloader()) == 1
        else:
            with pytest.raises(ValueError, match="has the columns"):
                data.setup("fit")


def test_hooks_exist():
    from alignment_modules import GRPOModule

    listed = re.search(r"### Hooks of a subclass\n\n.*?\n\n", README, flags=re.DOTALL)[0]
    methods = set(re.findall(r"`([a-z_]+)\([\w, ]*\)`", listed))
    known = {"describe", "objective", "extra_metrics", "extra_state", "load_extra_state", "count_tokens"}
    assert known | {"trained", "optimizer_for"} == methods
    assert all(callable(getattr(GRPOModule, name)) for name in methods)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_the_table_of_metrics_is_what_a_run_logs(align, paradigm, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from alignment_modules import get_module_class

    writes = get_module_class(paradigm).generates
    rows = [(names(row[0]), *row[1:4]) for row in table("Metrics")]
    expected = {
        tag_of(f"{stage}/{name}")
        for listed, *cells in rows
        for stage, cell in zip(("train", "val", "test"), cells, strict=True)
        if (cell == "all" and (writes or stage != "test")) or paradigm in cell.split(", ")
        for name in listed
    }
    common = [
        f"--config=configs/recipes/{paradigm}.yaml",
        "--model.policy.path=my-model",
        f"--trainer.default_root_dir={tmp_path}",
        *QUIET,
    ]
    source = f"{PARADIGMS[paradigm]}.jsonl"
    fit = [f"--data.train={source}", f"--data.validation={source}", "--trainer.max_steps=2"]
    fit += ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=1"]
    stops = json.dumps(list(string.ascii_letters + string.digits))  # an untrained policy hardly stops by itself
    common += [f"--model.{key}=my-model" for key in ROWS[paradigm].needs]
    common += ROWS[paradigm].recipe.get("metrics", ())
    if ROWS[paradigm].kind == "acting":
        common += [f"--model.stop_strings={stops}"]
    align(["fit", *common, *fit])
    judged = ["--model.evaluation.num_samples=8", f"--model.evaluation.stop_strings={stops}"]
    if writes:
        align(["test", *common, "--data.test=questions.jsonl", *judged])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == expected
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]  # optimizer steps


def test_contributing_example(workplace, align, tmp_path, monkeypatch):
    """The paradigm that CONTRIBUTING adds: its file passes its test and trains by its configuration."""
    files = titled(CONTRIBUTING, "python") | titled(CONTRIBUTING, "yaml")
    assert set(files) == {
        "alignment_modules/paradigms/unlikelihood.py",
        "tests/modules/test_unlikelihood.py",
        "configs/recipes/unlikelihood.yaml",
    }
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    for path, text in files.items():
        text = text.replace("alignment_modules.paradigms.unlikelihood", "unlikelihood").replace(
            "class_path: Unlikelihood", "class_path: unlikelihood.Unlikelihood"
        )
        (tmp_path / Path(path).name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_unlikelihood.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    arguments = [
        "fit",
        f"--config={tmp_path / 'unlikelihood.yaml'}",
        "--model.policy.path=my-model",
        "--data.train=pairs.jsonl",
    ]
    arguments += [f"--trainer.default_root_dir={tmp_path / 'run'}", *QUIET, "--trainer.log_every_n_steps=1"]
    metrics = align(arguments).trainer.callback_metrics
    assert {"train/loss", "train/nll_loss", "train/unlikelihood_loss", "train/rewards/accuracies"} <= metrics.keys()
