"""Two ordered lists of floors: a file imports from its own floor and from those below it, and from nowhere else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each package from the ground up; a name that is longer stands for the files below it, a shorter one for the rest.
PACKAGES = {
    "alignment_modules": (
        "alignment_modules.functional",
        "alignment_modules.policies",
        "alignment_modules.rewards",
        "alignment_modules.rollouts",
        "alignment_modules.evaluation",
        "alignment_modules.training",
        "alignment_modules.paradigms",
        "alignment_modules",  # the public names
        "alignment_modules.callbacks",
        "alignment_modules.cli",
        "alignment_modules.__main__",
    ),
    "datamodules": ("datamodules.rows", "datamodules.text", "datamodules"),
}
COMMAND_LINE = "alignment_modules.cli"  # brings both packages together
SAME_OBJECTIVE = {("pretrain", "sft")}  # pretraining is fine-tuning on every token
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor(name):
    """The number of a module's floor; None outside of both packages."""
    floors = PACKAGES.get(name.partition(".")[0])
    if floors is None:
        return None
    if name in floors:
        return floors.index(name)
    folder = max((f for f in floors if name.startswith(f + ".")), key=len)
    assert "." in folder or folder == "datamodules", f"{name} stands on no floor"
    return floors.index(folder)


def imports(path):
    known = {module(other) for other in FILES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else str(node.module)


@pytest.mark.parametrize("package", PACKAGES)
def test_there_is_something_on_every_floor(package):
    names = [module(path) for path in FILES if path.is_relative_to(ROOT / package)]
    assert {floor(name) for name in names} == {*range(len(PACKAGES[package]))}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_import_runs_back_up(path):
    name = module(path)
    own, package = floor(name), name.partition(".")[0]
    for other in imports(path):
        above = f"{name} imports {other}, which stands above it"
        if other.partition(".")[0] == package:
            assert floor(other) <= own, above
        elif floor(other) is not None:
            assert package == "alignment_modules", above
            assert own >= floor(COMMAND_LINE), above


def test_no_paradigm_imports_another():
    folder = ROOT / "alignment_modules" / "paradigms"
    others = {path.stem for path in folder.glob("*.py")} - {"__init__", "table"}
    for name in others:
        found = {other.rpartition(".")[2] for other in imports(folder / f"{name}.py") if ".paradigms." in other}
        assert {(name, other) for other in found} <= SAME_OBJECTIVE
