"""Pages of the documentation: which there are, their blocks, tables, links, and what each needs to run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    if "api" not in path.relative_to(ROOT).parts
}
README = PAGES["README.md"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LINKED = PAGES | {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")
}


@dataclass(frozen=True)
class Setting:
    """How a page is run.

    Args:
        fits: Whether its training runs belong to the fast tier; else its commands are only parsed there.
        session: Whether its Python blocks share their names, as in one session.
        files: Further files of its folder, by name.
        elsewhere: Kinds of blocks that another test runs, which needs more than a user's folder.
        writes: Files that its commands leave, as patterns: a later command moves an earlier run aside.
    """

    fits: bool = False
    session: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    writes: tuple[str, ...] = ()


SETTINGS = {
    "README.md": Setting(fits=True, writes=("runs/grpo*/test.jsonl",)),
    "docs/command_line.md": Setting(
        writes=(
            *(f"runs/sft*/{name}" for name in ("predictions.jsonl", "test.jsonl", "export/README.md")),
            *(f"runs/grpo*/{name}" for name in ("samples.jsonl", "samples.html")),
            "made-pairs.jsonl",
            "runs/dpo-lora/export/config.json",
            "sft-last/config.json",
        )
    ),
    "docs/coming_from.md": Setting(fits=True),
    "docs/data.md": Setting(session=True),
    "docs/environments.md": Setting(session=True, elsewhere={"sh": "tests/cli/test_looking_at_episodes.py"}),
}


def setting(page):
    return SETTINGS.get(page, Setting())


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def languages(text):
    return set(re.findall(r"^```(\w+)\n", text, flags=re.MULTILINE))


def commands(text):
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def titled(text, language):
    """Blocks that begin with a comment naming their file, by that name."""
    found = (re.match(r"# (\S+\.\w+)(?:,.*)?\n", block) for block in blocks(text, language))
    return {match[1]: match.string for match in found if match}


def prose(text):
    """A page without its blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def section(text, heading):
    """What stands below a heading of the second level."""
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def cells(text):
    """Rows of the first table of a text, as lists of cells."""
    block = next(part for part in text.strip().split("\n\n") if part.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def anchors(text):
    """What headings are linked to by: lower case, hyphens for spaces, no punctuation; a repeated one is numbered."""
    found = []
    for heading in re.findall(
        r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), flags=re.M
    ):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = sum(one == anchor or re.fullmatch(rf"{re.escape(anchor)}-\d+", one) is not None for one in found)
        found.append(f"{anchor}-{count}" if count else anchor)
    return found


PARADIGMS = section(README, "Paradigms")
MODULES = section(PAGES["docs/paradigms/index.md"], "Modules")
FORMATS = section(PAGES["docs/formats.md"], "Formats")
METRICS = section(PAGES["docs/metrics.md"], "All metrics")
HOOKS = section(PAGES["docs/extending.md"], "Hooks of a subclass").split("```")[0]
COMMANDS = PAGES["docs/command_line.md"].split("\n## ")[0]
