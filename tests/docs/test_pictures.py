"""Pictures of terminals are made of text alone: nothing in them is fetched, and what a policy wrote is no markup."""

import importlib.util
from xml.etree import ElementTree

import pytest

from tests.docs.pages import DOCS, ROOT

TERMINALS = ("chat", "inspect")


@pytest.fixture(scope="module")
def picture():
    spec = importlib.util.spec_from_file_location("terminal_picture", ROOT / "tools" / "terminal_picture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.picture


def check(svg):
    root = ElementTree.fromstring(svg)
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    assert {element.tag.split("}")[1] for element in root.iter()} <= {
        *("svg", "style", "defs", "clipPath", "rect", "g", "text", "circle"),
    }
    return " ".join("".join(root.itertext()).replace("\N{NO-BREAK SPACE}", " ").split())


@pytest.mark.parametrize("name", TERMINALS)
def test_pictures_are_of_text_alone(name):
    assert f"$ align {name}" in check((DOCS / f"{name}.svg").read_text(encoding="utf-8"))


def test_colours_are_kept_and_markup_is_text(picture):
    svg = picture("\x1b[1;36m[call] ask\x1b[0m <script>&amp;</script> " + "Z" * 100, "a <title>", 60)
    text = check(svg)
    assert "[call] ask" in text
    assert "<script>&amp;</script>" in text
    assert "a <title>" in text
    assert svg.count("Z") == 100  # what is too long goes on in the next line
    assert "Z" * 61 not in svg
    assert "font-weight: bold" in svg
