"""The sections of docs/environments.md on the interface and on tools: their code runs and prints what it should."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[3] / "docs" / "environments.md").read_text()


def test_the_code_runs(capsys):
    sections = PAGE.split("## The interface\n")[1].split("\n## The loop")[0]
    space = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", sections, flags=re.MULTILINE | re.DOTALL):
        exec(block, space)
    assert capsys.readouterr().out == "It is between 1 and 100.\n['is_above']\nLet me see. 42\n"
