"""What the page of troubles quotes is what the program says."""

import ast
import re

import pytest

from tests.docs.pages import PAGES, ROOT, prose

PAGE = "docs/troubleshooting.md"
HOLE = "…"


def texts(path):
    """String literals of a file, a hole for each value that is put in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


SAID = [
    text
    for folder in ("alignment_modules", "datamodules")
    for path in (ROOT / folder).rglob("*.py")
    for text in texts(path)
]
QUOTED = re.findall(r"^> (.+)$", prose(PAGES[PAGE]), flags=re.MULTILINE)


def is_said(quote):
    """Whether every piece of a quote between its holes stands in a literal."""
    pieces = [piece.strip() for piece in quote.split(HOLE)]
    return all(any(piece in text for text in SAID) for piece in pieces if len(piece) > 3)


def test_there_are_quotes():
    assert len(QUOTED) > 15


@pytest.mark.parametrize("quote", QUOTED)
def test_a_quoted_message_is_in_the_source(quote):
    assert max(len(piece) for piece in quote.split(HOLE)) > 15
    assert is_said(quote)


def test_what_nobody_says_is_found():
    assert not is_said("nothing to learn in epoch …: not one of its optimiser steps had a target")
