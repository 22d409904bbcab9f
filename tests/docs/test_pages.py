"""Every page of the documentation says what is true: its commands and code run, what it names and links to is there."""

import io
import re
import sys

import pytest

from tests.docs.options import is_option
from tests.docs.pages import (
    CONTRIBUTING,
    LINKED,
    PAGES,
    ROOT,
    anchors,
    blocks,
    commands,
    languages,
    prose,
    setting,
    titled,
)
from tests.docs.running import run_line

SOURCES = [path for folder in ("alignment_modules", "datamodules") for path in (ROOT / folder).rglob("*.py")]
CLASSES = {name for path in SOURCES for name in re.findall(r"^class (\w+)", path.read_text(), flags=re.MULTILINE)}
EVERY = pytest.mark.parametrize("page", PAGES)
WITH_COMMANDS = [page for page, text in PAGES.items() if commands(text)]
RUN = [pytest.param(page, marks=() if setting(page).fits else pytest.mark.slow) for page in WITH_COMMANDS]
PARSED = [page for page in WITH_COMMANDS if not setting(page).fits]


@pytest.mark.parametrize("page", RUN)
def test_every_command_runs_in_the_order_of_the_text(page, enter, earlier_runs, monkeypatch):
    folder = enter(page)
    for line in commands(PAGES[page]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("1+1=\n/quit\n"))  # what is said in `align chat`
        run_line(line, fits=True, before=earlier_runs)
    for pattern in setting(page).writes:
        assert list(folder.glob(pattern)), pattern


@pytest.mark.parametrize("page", PARSED)
def test_every_command_is_understood(page, enter, earlier_runs, monkeypatch):
    """What `make slow` runs: here training and evaluation are parsed alone."""
    enter(page)
    for line in commands(PAGES[page]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("1+1=\n/quit\n"))
        run_line(line, fits=False, before=earlier_runs)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "python")])
def test_python_blocks_run(page, enter, capsys):
    """Each block runs, and prints what the text says."""
    enter(page)
    space = {"__name__": "page"}
    for block in blocks(PAGES[page], "python"):
        exec(compile(block, page, "exec"), space if setting(page).session else {"__name__": "page"})
    printed = capsys.readouterr().out
    for told in re.findall(r"It prints `([^`]+)`", prose(PAGES[page])):
        assert f"{told}\n" in printed, told


@EVERY
def test_every_block_is_of_a_kind_that_is_checked(page):
    text = PAGES[page]
    assert languages(text) <= {"bash", "python", "yaml", "json", "text", *setting(page).elsewhere}
    assert len(re.findall("^```", text, flags=re.MULTILINE)) % 2 == 0
    for test in setting(page).elsewhere.values():
        assert (ROOT / test).exists()


@EVERY
def test_yaml_blocks_name_their_files_and_are_used(page):
    text = PAGES[page]
    assert len(titled(text, "yaml")) == len(blocks(text, "yaml"))
    for name in titled(text, "yaml"):
        assert any(name in line for line in [*commands(text), *blocks(text, "python")]), name


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(LINKED[page])):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        name = str(file.relative_to(ROOT))
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(LINKED[name]), target


@pytest.mark.parametrize("page", LINKED)
def test_paths_exist(page):
    """Every path below a folder of the repository, but for those that CONTRIBUTING's example adds."""
    added = set(titled(CONTRIBUTING, "python") | titled(CONTRIBUTING, "yaml"))
    folders = "tests|configs|examples|benchmarks|alignment_modules|datamodules|docs"
    for path in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./*]*\w", LINKED[page]):
        if path not in added and "unlikelihood" not in path and page != "CHANGELOG.md":
            assert list(ROOT.glob(path)), path


@EVERY
def test_classes_exist(page):
    for name in re.findall(r"`(\w+Module)\b", prose(PAGES[page])):
        assert name in CLASSES or name.startswith(("My", "Lightning")), name


@EVERY
def test_options_exist(page):
    """Options that the text names, `--data.max_length` or `--num-samples`, wherever they belong."""
    for code in re.findall(r"`([^`]+)`", prose(PAGES[page])):
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code):
            assert is_option(option), option
