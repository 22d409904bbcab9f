"""The lessons are scripts that lie beside each other and import each other, as they do where they are run."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def lesson(monkeypatch):
    """Imports a lesson by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "tutorial"))
    return importlib.import_module


@pytest.fixture
def printed(lesson, capsys):
    """Runs a lesson's main: what a reader sees."""

    def run(name):
        lesson(name).main()
        return capsys.readouterr().out

    return run
