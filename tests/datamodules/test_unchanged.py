"""Token ids and masks stay as they were when each row was tokenised alone, in one call after the other."""

import json
from pathlib import Path

import pytest

from tests.datamodules.corpus import CHATS, PLAIN, SHOWN, STYLES, TOKENIZERS, cases, outcome

# Recorded from the code that did so. A difference is a bug, unless a row's tokens are to change.
RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "encoding.json").read_text())


@pytest.mark.parametrize("group", [*TOKENIZERS, *(f"style {name}" for name in STYLES)])
def test_rows_are_what_they_were(group):
    of_group = {name: rest for name, *rest in cases() if name.startswith(f"{group} |")}
    assert len(of_group) == len(CHATS) + (len(PLAIN) + (len(SHOWN) - 1) * len(CHATS) if group in TOKENIZERS else 0)
    found = {name: outcome(*rest) for name, rest in of_group.items()}
    assert found == {name: RECORDED[name] for name in of_group}
