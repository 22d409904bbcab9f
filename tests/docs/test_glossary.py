"""The glossary is in order, each word once, and short."""

import re

from tests.docs.pages import PAGES

ENTRIES = re.split(r"^- ", PAGES["docs/glossary.md"], flags=re.MULTILINE)[1:]
TERMS = [re.match(r"\*\*(.+?)\*\*: ", entry)[1] for entry in ENTRIES]


def test_every_term_is_there_once_and_in_order():
    assert len(TERMS) > 60
    assert [term.casefold() for term in TERMS] == sorted({term.casefold() for term in TERMS})


def test_entries_are_short():
    for entry in ENTRIES:
        assert len(re.sub(r"\]\([^)]*\)", "]", entry)) < 270, entry
        assert entry.rstrip().endswith("."), entry
