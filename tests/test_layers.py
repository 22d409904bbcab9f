"""The layers of CONTRIBUTING: an import never runs back up."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UP = {  # what a folder must not import
    "alignment_modules/functional": ("alignment_modules",),
    "alignment_modules/policies": ("alignment_modules.rollouts", "alignment_modules.rewards", "alignment_modules.base"),
    "alignment_modules/rollouts": ("alignment_modules.evaluation", "alignment_modules.base"),
    "alignment_modules/evaluation": ("alignment_modules.base",),
    "alignment_modules/rewards": ("alignment_modules.rollouts", "alignment_modules.base"),
    "alignment_modules": ("datamodules", "alignment_modules.cli"),
    "datamodules": ("alignment_modules",),
}
# The command line brings both packages together.
COMMAND_LINE = ("cli", "__main__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield str(node.module)


@pytest.mark.parametrize("folder", UP)
def test_no_import_runs_back(folder):
    files = [path for path in (ROOT / folder).rglob("*.py") if not path.name.startswith(COMMAND_LINE)]
    assert files
    own = folder.replace("/", ".")
    for path in files:
        for name in imports(path):
            for above in UP[folder]:
                inside = folder.count("/") and (name == own or name.startswith(own + "."))
                assert inside or not (name + ".").startswith(above + "."), f"{path} imports {name}"
