"""The way through the examples: all lessons and notebooks, in their order, and links that lead somewhere."""

import re

import pytest

from tests.examples.conftest import EXAMPLES

README = (EXAMPLES / "README.md").read_text()
LESSONS = ("optimizer", "trainer", "dpo", "grpo", "ppo")


def test_all_lessons_are_there_in_their_order():
    expected = [f"tutorial/{name}_from_scratch.py" for name in LESSONS]
    assert re.findall(r"\]\((tutorial/[^)]+)", README) == expected
    assert re.findall(r"^python examples/(.+)$", README, flags=re.MULTILINE) == expected
    assert {path.stem.removesuffix("_from_scratch") for path in (EXAMPLES / "tutorial").glob("*.py")} == {*LESSONS}
    for number, name in enumerate(LESSONS, start=1):
        assert (EXAMPLES / "tutorial" / f"{name}_from_scratch.py").read_text().startswith(f'"""Lesson {number}, ')


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_every_example_is_linked(folder):
    for path in (EXAMPLES / folder).iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert f"]({path.relative_to(EXAMPLES)})" in README, path.name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (EXAMPLES / target).exists(), target


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_has_80_to_200_lines(name):
    assert 80 <= len((EXAMPLES / "tutorial" / f"{name}_from_scratch.py").read_text().splitlines()) <= 200
