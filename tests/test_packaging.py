"""The wheel and the source distribution: what they hold, that they agree, and that an installed wheel works alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
OURS = ("alignment_modules", "datamodules")


def test_versions_agree():
    """Of the project, its changelog, its citation, the installed package, and the newest tag."""
    import alignment_modules

    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert alignment_modules.__version__ == VERSION, "run `make setup`"
    listed = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    released = [entry for entry in listed if entry[0] != "Unreleased"]
    assert released[0][0] == VERSION
    assert listed[0] in (("Unreleased", ""), released[0])
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, flags=re.M)[1] == VERSION
    assert re.search(r"^date-released: (.+)$", citation, flags=re.M)[1] == released[0][1]
    if not (ROOT / ".git").exists():  # a source distribution has no tags
        return
    tags = git("tag", "--list", "v*", "--sort=-version:refname", "--merged").split()
    if tags:
        number = [int(part) for part in tags[0].removeprefix("v").split(".")]
        assert number <= [int(part) for part in VERSION.split(".")]
        assert tags[0].removeprefix("v") in {name for name, _ in released}
    here = git("tag", "--list", "v*", "--points-at", "HEAD").split()
    assert here in ([], [f"v{VERSION}"])


def test_the_citation_is_of_this_project():
    import jsonschema
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    text = {"type": "string", "minLength": 1}
    authors = {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["name"]}}
    required = {"cff-version": {"const": "1.2.0"}, "message": text, "title": text, "authors": authors}
    jsonschema.validate(citation, {"type": "object", "properties": required, "required": [*required]})
    assert citation["title"] == PROJECT["name"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert not {"url", "repository-code", "doi"} & set(citation)  # there is none


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def run(*command, cwd):
    """Runs a command outside this repository, and gives back what it wrote."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=kept, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def contents(path):
    """The files of a wheel with their content, but for the list of their hashes."""
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The repository's files, without what was built or run in it."""
    left_out = (".git", ".venv*", "build", "dist", "site", "runs", "*.egg-info", "__pycache__", ".*_cache")
    folder = tmp_path_factory.mktemp("clone") / "alignment-modules"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out), symlinks=True)
    return folder


@pytest.fixture(scope="module")
def dist(clone):
    """A wheel, made of a source distribution, and that one."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=clone)
    return clone / "dist"


def environment(folder):
    """The Python of an empty environment, which finds this one's libraries but not this repository."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    [site] = folder.glob("lib/python*/site-packages")
    libraries = Path(torch.__file__).parents[1]  # a line of a .pth file is a folder, whose own .pth files are not read
    (site / "libraries.pth").write_text(f"{libraries}\n")
    return folder / "bin" / "python"


def install(python, what, *options):
    """Installs without asking an index."""
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, *options, what, cwd=python.parent)


@pytest.mark.slow
def test_what_the_wheel_holds(dist):
    [wheel] = dist.glob("*.whl")
    names = set(contents(wheel))
    code = {path.relative_to(ROOT).as_posix() for name in OURS for path in (ROOT / name).rglob("*.py")}
    configs = {f"alignment_modules/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("configs/*/*.yaml")}
    shown = {f"alignment_modules/callbacks/samples/{name}" for name in ("page.html", "page.css", "data.js", "view.js")}
    assert names >= code | configs | shown | {f"{name}/py.typed" for name in OURS}
    assert {name.partition("/")[0] for name in names} == {*OURS, f"alignment_modules-{VERSION}.dist-info"}
    told = contents(wheel)[f"alignment_modules-{VERSION}.dist-info/METADATA"].decode()
    for line in (
        "License-Expression: Apache-2.0",
        "Author: the alignment-modules developers",
        "Requires-Python: >=3.11",
    ):
        assert f"\n{line}\n" in told
    assert "-url:" not in told.split("\n\n")[0].lower()


@pytest.mark.slow
def test_the_source_distribution_holds_the_repository(dist):
    with tarfile.open(dist / f"alignment_modules-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"SECURITY.md", "tests/conftest.py", "docs/data.md", "configs/recipes/sft.yaml", "constraints.txt"} <= names
    if (ROOT / ".git").exists():
        forge = (".github/", ".gitignore")
        assert {name for name in git("ls-files").splitlines() if not name.startswith(forge)} <= names


@pytest.mark.slow
def test_a_clone_builds_the_same_wheel(dist, clone, tmp_path):
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ".", cwd=clone)
    [one], [other] = dist.glob("*.whl"), tmp_path.glob("*.whl")
    assert contents(one) == contents(other)


@pytest.mark.slow
def test_an_installed_wheel_works_alone(dist, tmp_path):
    """Help, recipes by name, and two fits of 20 steps, in a folder that holds nothing but the user's rows."""
    python = environment(tmp_path / "env")
    [wheel] = dist.glob("*.whl")
    install(python, wheel)
    folder, align = tmp_path / "work", python.with_name("align")
    folder.mkdir()
    where = "import alignment_modules as a, datamodules as d; print(a.__file__, d.__file__, a.__version__)"
    first, second, version = run(python, "-c", where, cwd=folder).split()
    assert python.parents[1] in Path(first).parents
    assert python.parents[1] in Path(second).parents
    assert version == VERSION
    assert "sft, " in run(align, "--help", cwd=folder)
    assert "quickstart/pretrain" in run(align, "list", "recipes", cwd=folder)
    few = ("--trainer.max_steps=20", "--trainer.accelerator=cpu", "--trainer.devices=1")
    small = (
        "--data.train.init_args.size=2000",
        "--model.lr_scheduler=null",
        "--model.policy.config.num_hidden_layers=1",
    )
    run(align, "fit", "--config", "quickstart/pretrain", *few, *small, cwd=folder)
    policy = folder / "runs" / "quickstart" / "pretrain" / "export"
    rows = [{"prompt": f"{number}+1=", "completion": f"{number + 1}"} for number in range(20)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = (f"--model.policy.path={policy}", "--data.train=rows.jsonl", "--data.batch_size=2")
    run(align, "fit", "--config=sft", "--config=lora", *few, *given, cwd=folder)
    assert (folder / "runs" / "sft" / "export" / "model.safetensors").exists()
    run(align, "inspect", "--config=sft", *given, "--html=page.html", cwd=folder)
    assert (folder / "page.html").stat().st_size > 1000


@pytest.mark.slow
def test_a_clone_installs_without_make(clone, tmp_path):
    python = environment(tmp_path / "env")
    install(python, clone, "--no-build-isolation")
    assert "Supervised fine-tuning" in run(python.with_name("align"), "list", "recipes", cwd=tmp_path)


@pytest.mark.slow
def test_an_editable_clone_finds_its_recipes(clone, tmp_path):
    python = environment(tmp_path / "env")
    install(python, clone, "--no-build-isolation", "--editable")
    where = "from alignment_modules.cli.recipes import recipes; print(recipes()['sft'])"
    assert Path(run(python, "-c", where, cwd=tmp_path).strip()) == clone / "configs" / "recipes" / "sft.yaml"
