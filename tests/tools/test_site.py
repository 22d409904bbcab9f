"""The documentation's site: every public name is in its API reference, and its pages load nothing from a network."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import alignment_modules
import datamodules

ROOT = Path(__file__).parents[2]
REFERENCE = {path.stem: path.read_text() for path in sorted((ROOT / "docs/api").glob("*.md"))}
SHOWN = {name for text in REFERENCE.values() for name in re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)}


def public_names():
    """Full name of everything in an `__all__`."""
    for top in (alignment_modules, datamodules):
        packages = [info.name for info in pkgutil.walk_packages(top.__path__, f"{top.__name__}.") if info.ispkg]
        for package in (top.__name__, *packages):
            yield from (f"{package}.{name}" for name in getattr(importlib.import_module(package), "__all__", ()))


def missing(places):
    """Public names of which neither they themselves nor the same object of another package stand in some places."""
    found = {(name.rpartition(".")[2], id(value(name))) for name in public_names() if name in places}
    return [name for name in public_names() if (name.rpartition(".")[2], id(value(name))) not in found]


def value(name):
    package, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(package), attribute)


def test_every_public_name_is_in_the_reference():
    names = [name for name in public_names() if {name, name.rpartition(".")[0]} & SHOWN]
    assert len(names) > 150
    assert not missing(names)


def test_the_table_of_the_reference_has_every_page():
    assert set(re.findall(r"\]\((\w+)\.md\)", REFERENCE["index"])) == set(REFERENCE) - {"index"}


def test_blocks_stand_where_every_reader_of_markdown_sees_them():
    """Python-Markdown wants four spaces in a list, and an empty line before a list or a table; others want less."""
    for path in sorted((ROOT / "docs").rglob("*.md")):
        before, in_code = "", False
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            place = f"{path.relative_to(ROOT)}:{number}: {line}"
            indent, block = re.match(r"( *)(```|\||[-*] |\d+\. )?", line).groups()
            if block == "```":
                in_code = not in_code
            if block and (block == "```" or not in_code):
                assert len(indent) % 4 == 0, place
            if block and block != "```" and not in_code and not indent:
                kin = r"\|" if block == "|" else r" |[-*] |\d+\. "
                assert not before or re.match(kin, before), place
            before = line


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as strictly as `make docs` does: a broken link or anchor ends the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_every_public_name_has_a_place(site):
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    places = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    places.discard("alignment_modules.policies.divergence")  # the file, of which the function is shown
    if "alignment_modules.policies.divergence.divergence" in places:
        places.add("alignment_modules.policies.divergence")
    assert not missing(places)


@pytest.mark.slow
def test_pages_load_nothing_from_a_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    loads = re.compile(
        r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*href=["']?(?:https?:)?//"""
    )
    for page in pages:
        assert not loads.search(page.read_text()), page


@pytest.mark.slow
def test_formulas_are_drawn_by_the_browser(site):
    page = (site / "paradigms/dpo.html").read_text()
    assert page.count("<math") > 20
    assert "arithmatex" not in page


@pytest.mark.slow
def test_files_of_the_repository_are_pages(site):
    data = (site / "data.html").read_text()
    assert 'href="files/configs/data/mixture.yaml.html"' in data
    assert "class_path" in (site / "files/configs/data/mixture.yaml.html").read_text()
