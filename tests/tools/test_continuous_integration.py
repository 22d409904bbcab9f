"""Continuous integration runs what a contributor runs: targets of the Makefile, on every Python that is named."""

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = {path.name: path.read_text() for path in sorted((ROOT / ".github/workflows").glob("*.y*ml"))}
EVERY = pytest.mark.parametrize("name", WORKFLOWS)


def legs(job):
    """The values of `matrix` in each leg of a job; one without any, if it has no matrix."""
    matrix = dict(job.get("strategy", {}).get("matrix", {}))
    more = matrix.pop("include", [])
    product = [dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())]
    return product + more if matrix else more or [{}]


def commands(workflow):
    """Each `run` of each leg, its matrix filled in."""
    for job in yaml.safe_load(workflow)["jobs"].values():
        for leg in legs(job):
            for step in job["steps"]:
                if "run" in step:
                    yield re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda match, leg=leg: leg[match[1]], step["run"])


def local_commands():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    return {line for line in lines if line and not line.startswith(("#", "set ", "cd "))}


@EVERY
def test_every_command_is_a_target_of_the_makefile(name):
    for command in commands(WORKFLOWS[name]):
        program, target = command.split()
        assert program == "make"
        assert target in TARGETS


def test_the_workflow_runs_what_the_local_script_runs():
    assert local_commands() <= set(commands(WORKFLOWS["ci.yml"]))
    assert {"make check", "make test"} <= local_commands()


def test_every_target_stands_as_phony():
    assert set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)[1].split()) == TARGETS


@EVERY
def test_permissions_are_read_only(name):
    workflow = yaml.safe_load(WORKFLOWS[name])
    assert workflow["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in workflow["jobs"].values())
    assert "secrets." not in WORKFLOWS[name]


@EVERY
def test_actions_are_pinned(name):
    used = re.findall(r"uses: (\S+)", WORKFLOWS[name])
    assert used
    for action in used:
        assert re.fullmatch(r"actions/[\w-]+@(v\d+(\.\d+)*|[0-9a-f]{40})", action), action


def test_every_python_that_the_package_names_is_tested():
    prefix = "Programming Language :: Python :: 3."
    named = {f"3.{text.removeprefix(prefix)}" for text in PROJECT["project"]["classifiers"] if text.startswith(prefix)}
    tested = yaml.safe_load(WORKFLOWS["ci.yml"])["jobs"]["make"]["strategy"]["matrix"]
    assert set(tested["python"]) == named
    assert {leg["python"] for leg in tested["include"]} <= named
    assert PROJECT["project"]["requires-python"] == f">={min(named)}"


def test_lowest_dependencies_are_those_of_the_project():
    script = [sys.executable, ROOT / "tools/lowest.py"]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout.split()
    assert len(printed) == len(PROJECT["project"]["dependencies"])
    for constraint, requirement in zip(printed, PROJECT["project"]["dependencies"], strict=True):
        name, release = constraint.split("==")
        assert re.match(rf"{re.escape(name)}(\[\w+\])?>={re.escape(release)}(,|$)", requirement)


def test_hooks_before_a_commit_are_those_of_make_check():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    check = MAKEFILE.split("\ncheck: setup\n")[1].split("\n\n")[0]
    made = [line.strip().removeprefix("$(BIN)/").removesuffix(" .") for line in check.splitlines()]
    ran = [re.sub(r"\.venv/bin/| --force-exclude", "", hook["entry"]) for hook in hooks]
    assert ran == made
