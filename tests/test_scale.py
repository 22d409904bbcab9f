"""The table of what trains where in docs/scale.md: every cell is a test that runs, or says why there is none."""

from pathlib import Path

import pytest

from tests.contract import test_gradient, test_quantized, test_ranks
from tests.paradigms import ROWS

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
TESTS = {
    "CPU": [test_gradient.test_split],
    "DDP": [test_ranks.test_same_update_as_one_process],
    "FSDP2": [test_ranks.test_same_update_in_shards],
    "LoRA": [test_ranks.test_same_update_as_one_process, test_ranks.test_same_update_in_shards],
    "QLoRA": [test_quantized.test_the_adapters_alone_learn_whatever_the_split],
}


def table():
    """Cells by paradigm and column."""
    section = PAGE[PAGE.index("## What trains where") :].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    head, *rows = lines
    return {(row[0], column): cell for row in rows for column, cell in zip(head[1:], row[1:], strict=True)}


def cases(test):
    """The first argument of each of a test's cases."""
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    return [getattr(value, "values", (value,))[0] for value in mark.args[1]]


def test_the_table_has_every_paradigm():
    assert list(dict.fromkeys(name for name, _ in table())) == list(ROWS)
    assert list(dict.fromkeys(column for _, column in table())) == list(TESTS)


@pytest.mark.parametrize(("name", "column"), table())
def test_every_cell_is_a_test_or_a_reason(name, column):
    cell = table()[name, column]
    if cell.startswith("refused, because "):
        return
    case = cell.strip("`")
    assert case.split()[0] == name
    assert TESTS[column]
    assert all(case in cases(test) for test in TESTS[column])
