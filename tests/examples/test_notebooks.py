"""The notebooks run from their first cell to the last, show what their text says, and are stored without outputs."""

import re
import sys

import pytest

from tests.examples.conftest import EXAMPLES

NOTEBOOKS = EXAMPLES / "notebooks"
NAMES = ("dpo", "grpo")


def read(name):
    import nbformat

    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.fixture
def run_cells(monkeypatch, capsys):
    """What each code cell prints, all in this process."""

    def run(name):
        monkeypatch.chdir(NOTEBOOKS)
        monkeypatch.setattr(sys, "path", [*sys.path])
        shown, names = [], {"__name__": name}
        for cell in read(name).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{name}.ipynb", "exec"), names)
                shown.append(capsys.readouterr().out)
        return shown

    return run


def test_all_notebooks_are_tested():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_stored_of_a_run(name):
    for cell in read(name).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def numbers(line):
    """The numbers among a line's words."""
    return [float(number) for number in re.findall(r"(?<!\w)[-+]?\d+(?:\.\d+)?", line)]


def test_dpo_shows_what_its_text_says(run_cells):
    _, read_back, first, betas = run_cells("dpo")
    assert "[1.0, 0.5, 0.0] of rewards [1.0, 0.5, 0.0]" in read_back
    assert "loss from 0.693 to 0.693, h from 0.0 to 0.0" in first
    _, losses, hs, pulls = zip(*map(numbers, betas.splitlines()), strict=True)
    assert list(hs) == sorted(hs, reverse=True)
    assert list(pulls) == sorted(pulls, reverse=True)
    assert list(losses) == sorted(losses, reverse=True)


def test_grpo_shows_what_its_text_says(run_cells):
    _, group, step, clipped, trained = run_cells("grpo")
    assert "sum of the advantages: 0.0000" in group
    better, others = numbers(step)
    assert better > 0 > others
    ratios, positive, negative = (numbers(line)[-7:] for line in clipped.splitlines())
    assert positive == [ratio if ratio < 1.2 else 0 for ratio in ratios]
    assert negative == [-ratio if ratio > 0.8 else 0 for ratio in ratios]
    lines = trained.splitlines()
    assert numbers(lines[0])[1] < 0.2
    assert numbers(lines[-2])[1] > 0.8
    assert lines[-1] == "a sample: [5, 6, 7, 0]"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_executes_it_headless(name):
    from nbclient import NotebookClient

    notebook = read(name)
    folder = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs
    assert all(output.output_type == "stream" and output.name == "stdout" for output in outputs)
