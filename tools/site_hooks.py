"""Hooks of `mkdocs build`: formulas as MathML, and pages for files of the repository that the documentation links to.

The pages of `docs/` link to configurations, examples and tests by relative paths, which a reader of the repository
follows. The site has no repository to point to, so each such file becomes a page of it, below `files/`.
"""

import html
import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FOLDER = "files/"
LINK = re.compile(r"(\[[^\]]*\]\()([^)\s]+)(?=\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
LANGUAGES = {"": "text", ".cfg": "ini", ".ini": "ini", ".py": "python", ".sh": "bash", ".toml": "toml"}
LANGUAGES |= {".css": "css", ".html": "html", ".json": "json", ".txt": "text", ".yaml": "yaml", ".yml": "yaml"}


def linked_path(source: str, link: str) -> str | None:
    """What a relative link means in the repository.

    Args:
        source: Path in the repository of the file that has the link, such as `docs/data.md`.
        link: The link as it is written.

    Returns:
        The path of an existing file or folder in the repository, or `None`.
    """
    parts = urlsplit(link)
    if parts.scheme or not parts.path or parts.path.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), parts.path))
    return path if not path.startswith("..") and path != "." and (ROOT / path).exists() else None


def place_of(path: str) -> str:
    """Where a file or folder of the repository stands among the sources of the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    as_page = (ROOT / path).is_dir() or Path(path).suffix in LANGUAGES
    return f"{FOLDER}{path}.md" if as_page else f"{FOLDER}{path}"


def source_of(place: str) -> str:
    """The file of the repository that the site's source is or links on behalf of: the inverse of `place_of`."""
    if not place.startswith(FOLDER):
        return f"docs/{place}"
    path = place.removeprefix(FOLDER)
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def page_text(path: str) -> str:
    """Markdown that shows a file or folder of the repository."""
    whole = ROOT / path
    if whole.is_dir():
        inside = sorted(
            file.name for file in whole.iterdir() if file.is_file() and not file.name.startswith((".", "_"))
        )
        return f"# {path}\n\n" + "".join(f"- [{name}]({whole.name}/{name})\n" for name in inside)
    text = whole.read_text(encoding="utf-8")
    if whole.suffix == ".md":
        return text
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"# {path}\n\n{fence}{LANGUAGES[whole.suffix]}\n{text.rstrip()}\n{fence}\n"


def in_navigation(entries: Any) -> list[str]:
    """Every page that the navigation names, in whatever section."""
    if isinstance(entries, str):
        return [entries]
    inside = entries.values() if isinstance(entries, dict) else entries or ()
    return [place for entry in inside for place in in_navigation(entry)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds each file of the repository that a page or the navigation links to, and what those link to in turn."""
    waiting = [(source_of(file.src_uri), file.content_string) for file in files.documentation_pages()]
    named = [source_of(place) for place in in_navigation(config.nav) if place.startswith(FOLDER)]
    waiting.append(("mkdocs.yml", "".join(f"[]({path})" for path in named)))
    while waiting:
        source, text = waiting.pop()
        for path in filter(None, (linked_path(source, match[2]) for match in LINK.finditer(text))):
            place = place_of(path)
            if path.startswith("docs/") or place in files.src_uris:
                continue
            made = {"content": page_text(path)} if place.endswith(".md") else {"abs_src_path": str(ROOT / path)}
            files.append(File.generated(config, place, inclusion=InclusionLevel.NOT_IN_NAV, **made))
            if "content" in made:
                waiting.append((path, made["content"]))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at the pages that `on_files` added, and those of the added pages back into `docs/`."""
    place = page.file.src_uri
    source = source_of(place)

    def pointed(match: re.Match[str]) -> str:
        path = linked_path(source, match[2])
        if path is None or (path.startswith("docs/") and not place.startswith(FOLDER)):
            return match[0]
        fragment = urlsplit(match[2]).fragment
        link = posixpath.relpath(place_of(path), posixpath.dirname(place))
        return match[1] + link + (f"#{fragment}" if fragment else "")

    return LINK.sub(pointed, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns formulas into MathML, which browsers draw by themselves.

    Raises:
        PluginError: If a formula has a command that is not known.
    """

    def drawn(match: re.Match[str]) -> str:
        tag, formula = match[1], html.unescape(match[2])
        made = convert(formula, display="inline" if tag == "span" else "block").replace("\\_", "_")
        if "\\" in made:
            raise PluginError(f"{page.file.src_uri}: a command of the formula {formula!r} is not known")
        return made if tag == "span" else f'<div class="formula">{made}</div>'

    return FORMULA.sub(drawn, content)
