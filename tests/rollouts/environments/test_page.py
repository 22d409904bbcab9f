"""docs/environments.md on the interface, on tools and on rendering: its code runs and prints what it should."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[3] / "docs" / "environments.md").read_text()


def test_the_code_runs(capsys):
    sections = PAGE.split("## The interface\n")[1].split("\n## The loop")[0]
    rendering = PAGE.split("### How turns are rendered\n")[1].split("\n## ")[0].split("\n### ")[0]
    space = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", sections + rendering, flags=re.MULTILINE | re.DOTALL):
        exec(block, space)
    between = r"'\nTool: 42 <eos>\nAssistant: ' False"
    assert f"It prints `{between}`." in rendering
    assert capsys.readouterr().out == f"It is between 1 and 100.\n['is_above']\nLet me see. 42\n{between}\n"
